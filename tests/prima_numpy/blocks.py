"""Random weights of every type: any bits in the codes and packed scales, sane values in the float units."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.randomblocks import write_units

FLOAT_TYPES = (GGUFType.F32, GGUFType.F16, GGUFType.BF16)
QUANTISED = tuple(type for type in GGUFType if type not in FLOAT_TYPES)


def random_weight(type: GGUFType, rows: int, cols: int, seed: int = 0) -> Weight:
    rng = np.random.default_rng(seed)
    data = _floats(type, rng, rows * cols) if type in FLOAT_TYPES else _blocks(type, rng, rows * cols)
    data.flags.writeable = False
    return Weight("w", type, (rows, cols), data)


def random_stack(type: GGUFType, n_experts: int, rows: int, cols: int, seed: int = 0) -> Weight:
    return replace(random_weight(type, n_experts * rows, cols, seed), shape=(n_experts, rows, cols))


def random_rows(n: int, cols: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, cols), np.float32)


def _floats(type: GGUFType, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
    values = rng.standard_normal(n, np.float32)
    if type == GGUFType.BF16:
        return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8)
    return values.astype(np.float16 if type == GGUFType.F16 else np.float32).view(np.uint8)


def _blocks(type: GGUFType, rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
    block = BLOCKS[type]
    blocks = rng.integers(0, 256, (n // block.n_weights, block.n_bytes), np.uint8)
    d, dmin = rng.uniform(-0.01, 0.01, (2, len(blocks))).astype(np.float32)
    write_units(type, blocks, d, dmin)
    return blocks.reshape(-1)
