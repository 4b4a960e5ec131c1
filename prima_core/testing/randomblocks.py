"""Blocks of random codes, for test models of types that neither the `gguf` package nor `kquants.py` quantises to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from prima_core.model.quant import BLOCKS, GGUFType

Float32s = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALF_FIELDS: Mapping[GGUFType, tuple[int, ...]] = MappingProxyType(
    {
        GGUFType.Q4_0: (0,),
        GGUFType.Q4_1: (0, 2),
        GGUFType.Q5_0: (0,),
        GGUFType.Q5_1: (0, 2),
        GGUFType.Q8_0: (0,),
        GGUFType.Q2_K: (80, 82),
        GGUFType.Q3_K: (108,),
        GGUFType.Q4_K: (0, 2),
        GGUFType.Q5_K: (0, 2),
        GGUFType.Q6_K: (208,),
        GGUFType.IQ1_S: (0,),
        GGUFType.IQ2_XXS: (0,),
        GGUFType.IQ2_XS: (0,),
        GGUFType.IQ2_S: (0,),
        GGUFType.IQ3_XXS: (0,),
        GGUFType.IQ3_S: (0,),
        GGUFType.IQ4_NL: (0,),
        GGUFType.IQ4_XS: (0,),
    }
)
"""Where float16 units stand in a block: d, and dmin or m. IQ1_M scatters its d, MXFP4 has an exponent."""

# Of weights of random codes at d = 1: standard deviation, and the dmin that brings their mean to 0.
_SPREAD: Mapping[GGUFType, tuple[float, float]] = MappingProxyType(
    {
        GGUFType.Q2_K: (13.9, 1.5),
        GGUFType.Q3_K: (43.3, 0),
        GGUFType.Q5_K: (524, 15.5),
        GGUFType.IQ1_S: (7.2, 0),
        GGUFType.IQ1_M: (7.2, 0),
        GGUFType.IQ2_XXS: (53.3, 0),
        GGUFType.IQ2_XS: (55.7, 0),
        GGUFType.IQ2_S: (56.5, 0),
        GGUFType.IQ3_XXS: (142, 0),
        GGUFType.IQ3_S: (141, 0),
        GGUFType.IQ4_NL: (67, 0),
        GGUFType.IQ4_XS: (1243, 0),
    }
)
RANDOM_TYPES = frozenset(_SPREAD)


def random_blocks(weights: Float32s, type: GGUFType) -> Bytes:
    """Blocks [rows, bytes of a row] in place of `weights` [rows, columns]: as widely spread about 0, else unrelated.

    Equal weights give equal blocks. `type` is one of RANDOM_TYPES.
    """
    block = BLOCKS[type]
    n_blocks = weights.size // block.n_weights
    stream = np.random.PCG64(np.random.SeedSequence(crc32(weights.tobytes())))
    n_bytes = n_blocks * block.n_bytes
    blocks = stream.random_raw(-(-n_bytes // 8)).astype("<u8").view(np.uint8)[:n_bytes].reshape(n_blocks, -1)
    spread, ratio = _SPREAD[type]
    d = np.full(n_blocks, weights.std(dtype=np.float64) / spread, np.float32)
    write_units(type, blocks, d, d * np.float32(ratio))
    return blocks.reshape(weights.shape[0], -1)


def write_units(type: GGUFType, blocks: Bytes, d: Float32s, dmin: Float32s) -> None:
    """Write d [blocks] (and dmin or m, where there is one) into `blocks` [blocks, bytes] of a quantised type.

    Rounded to float16; for MXFP4 d is cut to a power of two.
    """
    if type is GGUFType.MXFP4:
        blocks[:, 0] = np.frexp(d)[1] + 127  # e8m0 of twice the unit
    elif type is GGUFType.IQ1_M:
        nibbles = _halves(d).view("<u2") >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | (nibbles << 4).astype(np.uint8)
    else:
        for start, unit in zip(HALF_FIELDS[type], (d, dmin), strict=False):
            blocks[:, start : start + 2] = _halves(unit)


def _halves(values: Float32s) -> Bytes:
    """[blocks] -> [blocks, 2]"""
    return values.astype("<f2")[:, None].view(np.uint8)
