"""What the bits of a quantised block mean: int8 codes, integer scales and minima per group, and float units.

Layouts: `block_*` in ggml-common.h; values: `dequantize_row_*` in ggml-quants.c. Every type fits the form of `Codes`
without rounding: where ggml has d * (0.5 + s) / 4, it is d / 8 times the odd number 2 s + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prima_core.model.codebooks import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4, Grid, sign_bytes
from prima_core.model.quant import GGUFType

Float32s = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Int32s = NDArray[np.int32]
Integers = NDArray[np.integer[Any]]  # of any width
Unsigned = TypeVar("Unsigned", np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, slots=True)
class Codes:
    """Unpacked blocks: weight = d * scale * code - dmin * minimum, where scale and minimum are per group of a block."""

    values: NDArray[np.int8]  # [blocks, groups, group size]
    d: Float32s  # [blocks]
    scales: Int32s | None = None  # [blocks, groups]; None: all 1
    minima: Int32s | None = None  # [blocks, groups]; None: all 0
    dmin: Float32s | None = None  # [blocks], where there are minima


# ---------------------------------------------------------------- blocks of 32: one group


def _unpack_q4_0(blocks: Bytes) -> Codes:
    return Codes(_one_group(_nibbles(blocks[:, 2:]), offset=8), _half(blocks[:, :2]))


def _unpack_q4_1(blocks: Bytes) -> Codes:
    return _with_minimum(_one_group(_nibbles(blocks[:, 4:])), blocks)


def _unpack_q5_0(blocks: Bytes) -> Codes:
    return Codes(_one_group(_five_bits(blocks[:, 2:6], blocks[:, 6:]), offset=16), _half(blocks[:, :2]))


def _unpack_q5_1(blocks: Bytes) -> Codes:
    return _with_minimum(_one_group(_five_bits(blocks[:, 4:8], blocks[:, 8:])), blocks)


def _unpack_q8_0(blocks: Bytes) -> Codes:
    return Codes(_one_group(blocks[:, 2:]), _half(blocks[:, :2]))


def _unpack_iq4_nl(blocks: Bytes) -> Codes:
    return Codes(_one_group(_looked_up(IQ4_NL, blocks[:, 2:])), _half(blocks[:, :2]))


def _unpack_mxfp4(blocks: Bytes) -> Codes:
    exponent = blocks[:, 0].astype(np.uint32)  # e8m0 of twice the unit; the lowest two units are subnormal
    bits = np.where(exponent < 2, np.uint32(0x200000) << exponent, (exponent - 1) << 23)
    return Codes(_one_group(_looked_up(MXFP4, blocks[:, 1:])), bits.astype(np.uint32).view(np.float32))


def _one_group(codes: NDArray[np.uint8] | NDArray[np.int8], offset: int = 0) -> NDArray[np.int8]:
    return codes.reshape(-1, 1, 32).view(np.int8) - np.int8(offset)


def _five_bits(fifth: Bytes, nibbles: Bytes) -> Bytes:
    high = np.unpackbits(fifth, axis=1, bitorder="little")
    return _nibbles(nibbles).reshape(-1, 32) | high << np.uint8(4)


def _with_minimum(codes: NDArray[np.int8], blocks: Bytes) -> Codes:
    """d and m lead the block; m is added, as ggml has it, and a minimum is taken off."""
    ones = np.ones((len(blocks), 1), np.int32)
    return Codes(codes, _half(blocks[:, :2]), None, ones, -_half(blocks[:, 2:4]))


# ---------------------------------------------------------------- K types: 256 in groups of 16 or 32


def _unpack_q2_k(blocks: Bytes) -> Codes:
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), range(0, 8, 2), 3)
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return Codes(
        codes.reshape(-1, 16, 16).view(np.int8),
        _half(blocks[:, 80:82]),
        scales.astype(np.int32),
        minima.astype(np.int32),
        _half(blocks[:, 82:84]),
    )


def _unpack_q3_k(blocks: Bytes) -> Codes:
    low = _fields(blocks[:, 32:96].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    high = _fields(blocks[:, :32], range(8), 1).reshape(-1, 16, 16)
    values = (low | high << 2).view(np.int8) - np.int8(4)
    low_scales = _nibbles(blocks[:, 96:104]).reshape(-1, 16)
    high_scales = _fields(blocks[:, 104:108], range(0, 8, 2), 3).reshape(-1, 16)
    return Codes(values, _half(blocks[:, 108:110]), (low_scales | high_scales << 4).astype(np.int32) - 32)


def _unpack_q4_k(blocks: Bytes) -> Codes:
    nibbles = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Codes(nibbles.view(np.int8), _half(blocks[:, :2]), *_packed_scales(blocks), _half(blocks[:, 2:4]))


def _unpack_q5_k(blocks: Bytes) -> Codes:
    nibbles = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    values = (nibbles | _fields(blocks[:, 16:48], range(8), 1) << 4).view(np.int8)
    return Codes(values, _half(blocks[:, :2]), *_packed_scales(blocks), _half(blocks[:, 2:4]))


def _unpack_q6_k(blocks: Bytes) -> Codes:
    nibbles = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    pairs = _fields(blocks[:, 128:192].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    values = (nibbles | pairs << 4).view(np.int8) - np.int8(32)
    return Codes(values, _half(blocks[:, 208:210]), blocks[:, 192:208].view(np.int8).astype(np.int32))


def _packed_scales(blocks: Bytes) -> tuple[Int32s, Int32s]:
    """Eight scales and eight minima of 6 bits in bytes 4 to 15 of Q4_K and Q5_K."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.hstack([first & 63, third & 15 | first >> 2 & 48])
    minima = np.hstack([second & 63, third >> 4 | second >> 2 & 48])
    return scales.astype(np.int32), minima.astype(np.int32)


# ---------------------------------------------------------------- IQ types: 256, codes from tables


def _unpack_iq4_xs(blocks: Bytes) -> Codes:
    low = _nibble_pairs(blocks[:, 4:8])
    high = _fields(_words(blocks[:, 2:4], "<u2"), range(0, 16, 2), 3).reshape(-1, 8)
    values = _looked_up(IQ4_NL, blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 8, 32)
    return Codes(values, _half(blocks[:, :2]), (low | high << 4).astype(np.int32) - 32)


def _unpack_iq2_xxs(blocks: Bytes) -> Codes:
    groups = blocks[:, 2:].reshape(-1, 8, 8)  # four indices, then 4 * 7 bits of signs and 4 of scale
    packed = _words(groups[:, :, 4:], "<u4")[:, :, 0]
    values = _negated(_entries(IQ2_XXS, groups[:, :, :4]), _four_signs(packed))
    return Codes(values.reshape(-1, 8, 32), _half(blocks[:, :2], 1 / 8), _odd(packed >> 28))


def _unpack_iq2_xs(blocks: Bytes) -> Codes:
    packed = _words(blocks[:, 2:66], "<u2")  # 9 bits of index, 7 of signs
    values = _negated(_entries(IQ2_XS, packed & 511), _even_signs(packed >> 9))
    return Codes(values.reshape(-1, 16, 16), _half(blocks[:, :2], 1 / 8), _odd(_nibble_pairs(blocks[:, 66:74])))


def _unpack_iq2_s(blocks: Bytes) -> Codes:
    high = _runs(blocks[:, 66:74], range(0, 8, 2), 3).reshape(-1, 32)
    index = blocks[:, 2:34] | high.astype(np.uint16) << 8
    values = _negated(_entries(IQ2_S, index), blocks[:, 34:66])
    return Codes(values.reshape(-1, 16, 16), _half(blocks[:, :2], 1 / 8), _odd(_nibble_pairs(blocks[:, 74:82])))


def _unpack_iq3_xxs(blocks: Bytes) -> Codes:
    packed = _words(blocks[:, 66:98], "<u4")
    values = _negated(_entries(IQ3_XXS, blocks[:, 2:66]), _four_signs(packed))
    return Codes(values.reshape(-1, 8, 32), _half(blocks[:, :2], 1 / 4), _odd(packed >> 28))


def _unpack_iq3_s(blocks: Bytes) -> Codes:
    high = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little")
    index = blocks[:, 2:66] | high.astype(np.uint16) << 8
    values = _negated(_entries(IQ3_S, index), blocks[:, 74:106])
    return Codes(values.reshape(-1, 8, 32), _half(blocks[:, :2]), _odd(_nibble_pairs(blocks[:, 106:110])))


def _unpack_iq1_s(blocks: Bytes) -> Codes:
    packed = _words(blocks[:, 34:50], "<u2")  # 4 * 3 bits of index, 3 of scale, the sign of the offset
    index = blocks[:, 2:34] | _runs(packed, range(0, 12, 3), 7).reshape(-1, 32) << 8
    values = _entries(IQ1, index).reshape(-1, 8, 32) + _offset(packed >> 15)[:, :, None]
    return Codes(values, _half(blocks[:, :2], 1 / 8), _odd(packed >> 12 & 7))


def _unpack_iq1_m(blocks: Bytes) -> Codes:
    high = _nibble_pairs(blocks[:, 32:48])  # 3 bits of index, the sign of the offset
    index = blocks[:, :32] | (high & 7).astype(np.uint16) << 8
    values = _entries(IQ1, index) + _offset(high >> 3)[:, :, None]
    packed = _words(blocks[:, 48:56], "<u2")  # 4 * 3 bits of scales, a nibble of d
    d = np.bitwise_or.reduce(packed >> 12 << np.array([0, 4, 8, 12], np.uint16), axis=1)
    scales = _odd(_runs(packed, range(0, 12, 3), 7).reshape(-1, 16))
    return Codes(values.reshape(-1, 16, 16), _half(d.view(np.uint8).reshape(-1, 2), 1 / 8), scales)


def _entries(grid: Grid, index: Integers) -> NDArray[np.int8]:
    """[blocks, entries, width]"""
    table = np.array(grid.values(), np.int8).reshape(-1, grid.width)
    entries: NDArray[np.int8] = table[index.reshape(len(index), -1)]
    return entries


def _negated(values: NDArray[np.int8], signs: Bytes) -> NDArray[np.int8]:
    """`values`, minus where a bit of `signs` is set: as many bits as values, lowest first."""
    is_minus = np.unpackbits(signs.reshape(-1), bitorder="little").reshape(values.shape)
    return np.where(is_minus, -values, values)


def _four_signs(packed: NDArray[np.uint32]) -> Bytes:
    """Four sign bytes from the lower 28 bits of each."""
    return _even_signs(_runs(packed, range(0, 28, 7), 127))


def _even_signs(index: Integers) -> Bytes:
    signs: Bytes = np.array(sign_bytes(), np.uint8)[index]
    return signs


def _odd(scales: Integers) -> Int32s:
    return 2 * scales.astype(np.int32) + 1


def _offset(is_minus: Integers) -> NDArray[np.int8]:
    """The eighth that IQ1 adds to its grid, in eighths."""
    return np.where(is_minus, np.int8(-1), np.int8(1))


def _looked_up(table: tuple[int, ...], packed: Bytes) -> NDArray[np.int8]:
    """[..., k] bytes -> [..., 2, k] levels"""
    return np.array(table, np.int8)[_nibbles(packed)]


# ---------------------------------------------------------------- bits


def _nibbles(packed: Bytes) -> Bytes:
    """[..., k] -> [..., 2, k]: all low nibbles, then all high ones."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _nibble_pairs(packed: Bytes) -> Bytes:
    """[blocks, k] -> [blocks, 2 k]: low and high nibble of each byte in turn."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _fields(packed: NDArray[Unsigned], shifts: range, mask: int) -> NDArray[Unsigned]:
    """[..., k] -> [..., shifts, k]"""
    return np.stack([packed >> shift & mask for shift in shifts], axis=-2)


def _runs(packed: NDArray[Unsigned], shifts: range, mask: int) -> NDArray[Unsigned]:
    """[..., k] -> [..., k, shifts]"""
    return np.stack([packed >> shift & mask for shift in shifts], axis=-1)


def _words(packed: Bytes, dtype: str) -> NDArray[np.uint32]:
    """[..., bytes] -> [..., words]"""
    return np.ascontiguousarray(packed).view(dtype)


def _half(two_bytes: Bytes, unit: float = 1) -> Float32s:
    """[blocks, 2] -> [blocks], times `unit`, a power of two."""
    with np.errstate(invalid="ignore"):  # hostile blocks hold NaN
        return np.ascontiguousarray(two_bytes).view("<f2")[:, 0].astype(np.float32) * np.float32(unit)


UNPACK: Mapping[GGUFType, Callable[[Bytes], Codes]] = MappingProxyType(
    {
        GGUFType.Q4_0: _unpack_q4_0,
        GGUFType.Q4_1: _unpack_q4_1,
        GGUFType.Q5_0: _unpack_q5_0,
        GGUFType.Q5_1: _unpack_q5_1,
        GGUFType.Q8_0: _unpack_q8_0,
        GGUFType.Q2_K: _unpack_q2_k,
        GGUFType.Q3_K: _unpack_q3_k,
        GGUFType.Q4_K: _unpack_q4_k,
        GGUFType.Q5_K: _unpack_q5_k,
        GGUFType.Q6_K: _unpack_q6_k,
        GGUFType.IQ1_S: _unpack_iq1_s,
        GGUFType.IQ1_M: _unpack_iq1_m,
        GGUFType.IQ2_XXS: _unpack_iq2_xxs,
        GGUFType.IQ2_XS: _unpack_iq2_xs,
        GGUFType.IQ2_S: _unpack_iq2_s,
        GGUFType.IQ3_XXS: _unpack_iq3_xxs,
        GGUFType.IQ3_S: _unpack_iq3_s,
        GGUFType.IQ4_NL: _unpack_iq4_nl,
        GGUFType.IQ4_XS: _unpack_iq4_xs,
        GGUFType.MXFP4: _unpack_mxfp4,
    }
)
"""From blocks [blocks, bytes of a block]. What is not here is stored as floats."""
