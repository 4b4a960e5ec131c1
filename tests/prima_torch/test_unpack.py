from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.quant import dequantize
from prima_torch.planes import Planes, split
from prima_torch.unpack import Unpacker
from tests.prima_numpy.blocks import random_weight

CPU = torch.device("cpu")


def planes_of(type: GGUFType, rows: int = 5, columns: int = 512) -> tuple[Planes, NDArray[np.float32]]:
    weight = random_weight(type, rows, columns)
    return split(type, rows, columns, torch.from_numpy(weight.data.copy())), dequantize(type, weight.data, weight.shape)


@pytest.mark.parametrize("type", BLOCKS)
def test_every_type_has_the_bits_of_numpy(type: GGUFType) -> None:
    planes, expected = planes_of(type)
    values = Unpacker(CPU).rows(planes, 0, 5)
    assert values.dtype is torch.float32
    np.testing.assert_array_equal(values.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type", BLOCKS)
def test_some_rows_are_the_same_as_in_the_whole(type: GGUFType) -> None:
    planes, expected = planes_of(type)
    unpacker = Unpacker(CPU)
    np.testing.assert_array_equal(unpacker.rows(planes, 1, 4).numpy(), expected[1:4])
    np.testing.assert_array_equal(unpacker.picked(planes, torch.tensor([4, 0, 4])).numpy(), expected[[4, 0, 4]])


def test_every_exponent_of_mxfp4_has_the_bits_of_numpy() -> None:
    data = np.random.default_rng(3).integers(0, 256, (256, 17), np.uint8)
    data[:, 0] = np.arange(256)
    planes = split(GGUFType.MXFP4, 256, 32, torch.from_numpy(data.reshape(-1)))
    np.testing.assert_array_equal(
        Unpacker(CPU).rows(planes, 0, 256).numpy(), dequantize(GGUFType.MXFP4, data.reshape(-1), (256, 32))
    )
