"""Products and floats of quantised matrices against the reference, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy import quant
from prima_torch.kernels.linear import dequantize, matvec, matvec_experts
from prima_torch.kernels.shapes import SHAPES
from prima_torch.planes import Planes, split
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight


def planes_of(weight: Weight) -> Planes:
    rows, columns = weight.shape[-2:]
    return split(weight.type, weight.data.size and int(np.prod(weight.shape[:-1])), columns, torch.tensor(weight.data))


def as_floats(weight: Weight) -> np.ndarray:
    return quant.dequantize(weight.type, weight.data, weight.shape)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("type", SHAPES)
def test_a_product_equals_that_with_dequantised_weights(type: GGUFType, n: int) -> None:
    weight = random_weight(type, rows=19, cols=768)
    x = random_rows(n, 768)
    product = matvec(torch.from_numpy(x), planes_of(weight))
    np.testing.assert_allclose(product.numpy(), x @ as_floats(weight).T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", SHAPES)
def test_floats(type: GGUFType, dtype: torch.dtype) -> None:
    weight = random_weight(type, rows=19, cols=768)
    out = torch.empty(11, 768, dtype=dtype)
    dequantize(planes_of(weight), out, first_row=5)
    expected = torch.from_numpy(as_floats(weight)[5:16])
    # The interpreter cuts to bfloat16 where a GPU rounds.
    torch.testing.assert_close(out.float(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 2**-11, atol=1e-7)
