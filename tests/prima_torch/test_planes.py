from __future__ import annotations

import numpy as np
import pytest
import torch

from prima_core.model.quant import BLOCKS, GGUFType
from prima_torch.planes import layout, split


@pytest.mark.parametrize("type", BLOCKS)
def test_the_fields_of_every_type_fill_its_block(type: GGUFType) -> None:
    ends = [0, *(stop for _, _, stop in layout(type))]
    assert [start for _, start, _ in layout(type)] == ends[:-1]
    assert ends[-1] == BLOCKS[type].n_bytes


@pytest.mark.parametrize("type", BLOCKS)
def test_planes_hold_every_byte_once(type: GGUFType) -> None:
    block = BLOCKS[type]
    data = np.random.default_rng(1).integers(0, 256, 3 * 2 * block.n_bytes, np.uint8)
    planes = split(type, 3, 2 * block.n_weights, torch.from_numpy(data))
    assert planes.n_bytes == len(data)
    blocks = data.reshape(3, 2, block.n_bytes)
    for name, start, stop in layout(type):
        assert torch.equal(planes.fields[name], torch.from_numpy(blocks[:, :, start:stop].copy()))
