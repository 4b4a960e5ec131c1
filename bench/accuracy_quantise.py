"""bench/accuracy.py: weights in any type that prima reads.

The `gguf` package quantises to Q4_0 ... Q8_0, F16, BF16 and MXFP4. The others are plain searches here: the nearest
codes for a few scales of each group, without the importance of weights that llama.cpp's quantiser knows. So a model
gets worse than llama.cpp would make it, which does not matter where two computations with the same blocks are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bench import accuracy_blocks as pack
from prima_core.model.codebooks import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, Grid
from prima_core.model.quant import GGUFType
from prima_core.testing.kquants import (
    Bytes,
    Float32s,
    affine,
    divide,
    groups,
    quantize_q4_k,
    quantize_q6_k,
    unit_and_codes,
)

Indices = NDArray[np.intp]

AT_ONCE = 1 << 20
"""Distances that are held at once."""
SHARES = tuple(np.linspace(0.4, 1.05, 14))
"""Scales that are tried for a group: of that which makes its largest weight the largest level."""


def quantised(type: GGUFType, weights: Float32s) -> Bytes:
    """`weights` [rows, columns] as the bytes of a tensor of that type."""
    if type in QUANTISERS:
        return QUANTISERS[type](weights).reshape(-1)
    import gguf

    return gguf.quantize(weights, gguf.GGMLQuantizationType(type)).reshape(-1).view(np.uint8)


# ---------------------------------------------------------------- K types


def _q2_k(weights: Float32s) -> Bytes:
    return pack.pack_q2_k(*affine(groups(weights, 16), largest=3, largest_scale=15))


def _q3_k(weights: Float32s) -> Bytes:
    x = groups(weights, 16)
    d, scales = _signed_scales(_extreme(x) / np.float32(-4), largest=31)
    q = np.clip(np.rint(divide(x, (d * scales)[:, :, None])), -4, 3).astype(np.int8)
    return pack.pack_q3_k(q + 4, d, scales.astype(np.int8) + 32)


def _q5_k(weights: Float32s) -> Bytes:
    return pack.pack_q5_k(*affine(groups(weights, 8), largest=31, largest_scale=63))


def _signed_scales(wanted: Float32s, largest: int) -> tuple[Float32s, Float32s]:
    """`wanted` [blocks, groups] of either sign as a unit [blocks, 1] and whole numbers."""
    d, sizes = unit_and_codes(np.abs(wanted), largest)
    return d, np.copysign(sizes.astype(np.float32), wanted)


def _extreme(x: Float32s) -> Float32s:
    """[blocks, groups, n] -> [blocks, groups]: the largest by size, with its sign."""
    at = np.abs(x).argmax(axis=2)
    return np.take_along_axis(x, at[:, :, None], axis=2)[:, :, 0]


# ---------------------------------------------------------------- IQ4: levels

_IQ4 = np.array(IQ4_NL, np.float32)


def _iq4_nl(weights: Float32s) -> Bytes:
    x = weights.reshape(-1, 1, 32)
    d = _best_step(x, _IQ4).astype(np.float16).astype(np.float32)
    return pack.pack_iq4_nl(_nearest_levels(x, d, _IQ4), d)


def _iq4_xs(weights: Float32s) -> Bytes:
    x = groups(weights, 8)
    d, scales = _signed_scales(_best_step(x, _IQ4), largest=31)
    return pack.pack_iq4_xs(_nearest_levels(x, d * scales, _IQ4), d, scales.astype(np.int8) + 32)


def _best_step(x: Float32s, *choices: Float32s) -> Float32s:
    """[blocks, groups]: what a level of 1 had better stand for, if each weight could have any of the levels, and each
    group the better one of the `choices` of levels."""
    best, least = np.zeros(x.shape[:2], np.float32), np.full(x.shape[:2], np.inf, np.float32)
    for levels in choices:
        for share in SHARES:
            step = _extreme(x) / _extreme(levels.reshape(1, 1, -1)) * np.float32(share)
            off = x - levels[_nearest_levels(x, step, levels)] * step[:, :, None]
            error = (off * off).sum(axis=2)
            best, least = np.where(error < least, step, best), np.minimum(error, least)
    return best


def _nearest_levels(x: Float32s, step: Float32s, levels: Float32s) -> Indices:
    """Of levels that go up."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, divide(x, step[:, :, None]))


# ---------------------------------------------------------------- IQ2 and IQ3: grids of sizes, and signs


@dataclass(frozen=True, slots=True)
class GridForm:
    """A weight is d * unit * (2 * scale + 1) * level, with its sign; of `group` weights the scale, below 16, is one.

    `even_signs`: of eight weights an even number is negative, or else one counts as negative that is not.
    """

    grid: Grid
    unit: float
    group: int
    even_signs: bool
    pack: Callable[[NDArray[np.intp], Bytes, Float32s, Bytes], Bytes]

    def quantise(self, weights: Float32s) -> Bytes:
        x = weights.reshape(-1, 32, 8)
        signs, sizes = self._signs(x)
        sizes = sizes.reshape(len(x), -1, self.group)
        step = np.abs(_best_step(sizes, np.array(self.grid.levels, np.float32)))
        d, scales = _odd_scales(step, self.unit, largest=15)
        table = np.array(self.grid.values(), np.float32).reshape(-1, self.grid.width)
        index = _nearest(divide(sizes, _step(d, self.unit, scales)), table)[0]
        return self.pack(index.reshape(len(x), -1), signs, d, scales)

    def _signs(self, x: Float32s) -> tuple[Bytes, Float32s]:
        """Sign bytes [blocks, 32], and what is left to the grid, hardly ever negative, [blocks, 32, 8]."""
        is_minus = x < 0
        if self.even_signs:
            least = np.abs(x).argmin(axis=2)[:, :, None]
            is_odd = is_minus.sum(axis=2, keepdims=True) % 2 == 1
            flipped = np.take_along_axis(is_minus, least, axis=2) ^ is_odd
            np.put_along_axis(is_minus, least, flipped, axis=2)
        return np.packbits(is_minus, axis=2, bitorder="little")[:, :, 0], np.where(is_minus, -x, x)


def _odd_scales(step: Float32s, unit: float, largest: int) -> tuple[Float32s, Bytes]:
    """`step` [blocks, groups] as about d * unit * (2 * scale + 1): d [blocks, 1] and scales up to `largest`."""
    top = step.max(axis=1, keepdims=True) / np.float32(unit * (2 * largest + 1))
    d = top.astype(np.float16).astype(np.float32)
    scales = np.rint((divide(step, d * np.float32(unit)) - 1) / 2)
    return d, np.clip(scales, 0, largest).astype(np.uint8)


def _step(d: Float32s, unit: float, scales: Bytes) -> Float32s:
    """[blocks, groups, 1]"""
    return (d * np.float32(unit) * (2 * scales.astype(np.float32) + 1))[:, :, None]


def _nearest(x: Float32s, table: Float32s) -> tuple[Indices, Float32s]:
    """Of x [..., n] the nearest entries of a table [entries, width], and squares of the distances: [..., n / width]."""
    points = x.reshape(-1, table.shape[1])
    # Less the square of the point itself, which does not matter to which is nearest: one matrix product.
    product = np.vstack([-2 * table.T, (table * table).sum(axis=1)])
    index, apart = np.empty(len(points), np.intp), (points * points).sum(axis=1)
    n = AT_ONCE // len(table)
    for start in range(0, len(points), n):
        some = points[start : start + n]
        distances = np.hstack([some, np.ones((len(some), 1), np.float32)]) @ product
        index[start : start + n] = best = distances.argmin(axis=1)
        apart[start : start + n] += distances[np.arange(len(some)), best]
    shape = *x.shape[:-1], -1
    return index.reshape(shape), apart.reshape(shape)


# ---------------------------------------------------------------- IQ1: a grid of -8, 0, 8, moved up or down by 1

_IQ1 = np.array(IQ1.values(), np.float32).reshape(-1, IQ1.width)
_MOVED = tuple(np.array(IQ1.levels, np.float32) + np.float32(offset) for offset in (1, -1))
_IQ1_UNIT = 1 / 8


def _iq1_s(weights: Float32s) -> Bytes:
    """One offset for the 32 weights of a group."""
    index, apart, d, scales = _iq1(groups(weights, 8))
    is_minus = apart[1].sum(axis=2) < apart[0].sum(axis=2)  # [blocks, 8]
    chosen = np.where(is_minus[:, :, None], index[1], index[0])
    return pack.pack_iq1_s(chosen.reshape(len(chosen), -1), is_minus, d, scales)


def _iq1_m(weights: Float32s) -> Bytes:
    """One offset for the 8 weights of an entry; groups have 16."""
    index, apart, d, scales = _iq1(groups(weights, 16))
    is_minus = apart[1] < apart[0]  # [blocks, 16, 2]
    chosen = np.where(is_minus, index[1], index[0])
    return pack.pack_iq1_m(chosen.reshape(len(chosen), -1), is_minus.reshape(len(chosen), -1), d, scales)


def _iq1(x: Float32s) -> tuple[Indices, Float32s, Float32s, Bytes]:
    """Nearest entries if the offset is +1 and if it is -1, [2, blocks, groups, entries], how far off they are, d and
    scales."""
    d, scales = _odd_scales(np.abs(_best_step(x, *_MOVED)), _IQ1_UNIT, largest=7)
    scaled = divide(x, _step(d, _IQ1_UNIT, scales))
    plus, minus = (_nearest(scaled - np.float32(offset), _IQ1) for offset in (1, -1))
    return np.stack([plus[0], minus[0]]), np.stack([plus[1], minus[1]]), d, scales


QUANTISERS: Mapping[GGUFType, Callable[[Float32s], Bytes]] = MappingProxyType(
    {
        GGUFType.Q2_K: _q2_k,
        GGUFType.Q3_K: _q3_k,
        GGUFType.Q4_K: quantize_q4_k,
        GGUFType.Q5_K: _q5_k,
        GGUFType.Q6_K: quantize_q6_k,
        GGUFType.IQ4_NL: _iq4_nl,
        GGUFType.IQ4_XS: _iq4_xs,
        GGUFType.IQ2_XXS: GridForm(IQ2_XXS, 1 / 8, 32, True, pack.pack_iq2_xxs).quantise,
        GGUFType.IQ2_XS: GridForm(IQ2_XS, 1 / 8, 16, True, pack.pack_iq2_xs).quantise,
        GGUFType.IQ2_S: GridForm(IQ2_S, 1 / 8, 16, False, pack.pack_iq2_s).quantise,
        GGUFType.IQ3_XXS: GridForm(IQ3_XXS, 1 / 4, 32, True, pack.pack_iq3_xxs).quantise,
        GGUFType.IQ3_S: GridForm(IQ3_S, 1, 32, False, pack.pack_iq3_s).quantise,
        GGUFType.IQ1_S: _iq1_s,
        GGUFType.IQ1_M: _iq1_m,
    }
)
