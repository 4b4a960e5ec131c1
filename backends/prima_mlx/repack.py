"""The types of most models, repacked at once: what `quant.py` does for any type, in a tenth of the time.

A streamed tensor is repacked in every pass, so this is worth its own way: bits are moved within words of up to eight
codes, never one by one, and no code has a byte of its own longer than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.model.quant import GGUFType
from prima_core.model.unpack import Bytes, Float32s

Words = NDArray[np.unsignedinteger[Any]]
Sets = tuple[tuple[Float32s, Float32s], ...]
Repack = Callable[[Bytes, Bytes, Sets], None]
"""Blocks [n, bytes] -> codes, uint8 [n * bytes], and for each set scales and biases, float32 [n * groups]: all are
written in place."""


def _q4_0(blocks: Bytes, codes: Bytes, sets: Sets) -> None:
    """Sixteen low nibbles, then the sixteen high ones."""
    words = blocks.view("<u2")
    [(scales, biases)] = sets
    scales[:] = _half(words[:, 0])
    np.multiply(scales, np.float32(-8), out=biases)
    _pack_nibbles(np.ascontiguousarray(words[:, 1:]), codes, "<f8")


def _q4_k(blocks: Bytes, codes: Bytes, sets: Sets) -> None:
    """Four times 32 low nibbles, then the 32 high ones."""
    words = blocks.view("<u4")
    _scale_with_minima(words, sets)
    _pack_nibbles(np.ascontiguousarray(words[:, 4:]).view("<u2"), codes, "<c16")


def _q5_k(blocks: Bytes, codes: Bytes, sets: Sets) -> None:
    """As Q4_K; the fifth bits of the eight groups are in the bits of the same 32 bytes."""
    words = blocks.view("<u4")
    _scale_with_minima(words, sets)
    fifth = np.ascontiguousarray(words[:, 4:12]).view("<u8")[:, None, :]  # [blocks, 1, 4]: eight codes in a word
    nibbles = np.ascontiguousarray(words[:, 12:]).view("<u8").reshape(-1, 4, 4)
    wide = np.empty((len(blocks), 8, 4), "<u8")
    shifts = np.array([0, 2, 4, 6], np.uint64)[:, None]
    low, high = wide[:, 0::2], wide[:, 1::2]
    np.bitwise_and(nibbles, _each(0x0F), out=low)
    low |= (fifth >> shifts & _each(0x01)) << np.uint64(4)
    np.right_shift(nibbles, np.uint64(4), out=high)
    high &= _each(0x0F)
    high |= (fifth >> (shifts + np.uint64(1)) & _each(0x01)) << np.uint64(4)
    _pack(wide.reshape(-1), 5, codes)


def _q6_k(blocks: Bytes, codes: Bytes, sets: Sets) -> None:
    """Two halves of 64 bytes with low bits and 32 with high ones: 32 codes from the low and 32 from the high nibbles of
    each 32 bytes."""
    d = _half(np.ascontiguousarray(blocks[:, 208:210]).view("<u2")[:, 0])
    own = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).reshape(-1, 8, 2)
    for index, (scales, biases) in enumerate(sets):
        np.multiply(own[:, :, index], d[:, None], out=scales.reshape(-1, 8))
        np.multiply(scales, np.float32(-32), out=biases)
    nibbles = np.ascontiguousarray(blocks[:, :128]).view("<u8").reshape(-1, 2, 2, 4)
    pairs = np.ascontiguousarray(blocks[:, 128:192]).view("<u8").reshape(-1, 2, 1, 4)
    wide = np.empty((len(blocks), 2, 4, 4), "<u8")
    shifts = np.array([0, 2], np.uint64)[:, None]
    low, high = wide[:, :, :2], wide[:, :, 2:]
    np.bitwise_and(nibbles, _each(0x0F), out=low)
    low |= (pairs >> shifts & _each(0x03)) << np.uint64(4)
    np.right_shift(nibbles, np.uint64(4), out=high)
    high &= _each(0x0F)
    high |= pairs >> shifts & _each(0x30)
    _pack(wide.reshape(-1), 6, codes)


def _q8_0(blocks: Bytes, codes: Bytes, sets: Sets) -> None:
    [(scales, biases)] = sets
    scales[:] = _half(np.ascontiguousarray(blocks[:, :2]).view("<u2")[:, 0])
    np.multiply(scales, np.float32(-128), out=biases)
    np.bitwise_xor(blocks[:, 2:], np.uint8(128), out=codes.reshape(-1, 32))


REPACK: Mapping[GGUFType, Repack] = MappingProxyType(
    {
        GGUFType.Q4_0: _q4_0,
        GGUFType.Q4_K: _q4_k,
        GGUFType.Q5_K: _q5_k,
        GGUFType.Q6_K: _q6_k,
        GGUFType.Q8_0: _q8_0,
    }
)


def _half(bits: Words) -> Float32s:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _each(byte: int) -> np.uint64:
    """In all eight bytes of a word."""
    return np.uint64(byte * 0x0101010101010101)


def _scale_with_minima(words: Words, sets: Sets) -> None:
    """Of Q4_K and Q5_K: d, dmin, and eight scales and minima of 6 bits in the next 12 bytes."""
    [(scales, biases)] = sets
    units, first, second, third = np.ascontiguousarray(words[:, :4].T)
    low, high = np.uint32(0x3F3F3F3F), np.uint32(0x30303030)
    nibbles = np.uint32(0x0F0F0F0F)
    own, minima = np.empty((len(words), 2), "<u4"), np.empty((len(words), 2), "<u4")
    own[:, 0], own[:, 1] = first & low, third & nibbles | first >> 2 & high
    minima[:, 0], minima[:, 1] = second & low, third >> 4 & nibbles | second >> 2 & high
    np.multiply(own.view(np.uint8), _half(units & 0xFFFF)[:, None], out=scales.reshape(-1, 8))
    np.multiply(minima.view(np.uint8), -_half(units >> 16)[:, None], out=biases.reshape(-1, 8))


def _pack_nibbles(pairs: Words, codes: Bytes, unit: str) -> None:
    """Bytes with a low and a high nibble, two in a word, to the low nibbles of a unit of words and then its high ones.
    `unit` is a type as large as the codes of half of them: it only moves bytes."""
    out = codes.view(unit).reshape(-1, 2)
    low = pairs & 0x0F0F
    high = low >> 4
    low |= high
    out[:, 0] = low.astype(np.uint8).reshape(-1).view(unit)
    np.right_shift(pairs, 4, out=high)
    high &= 0x0F0F
    np.right_shift(high, 4, out=low)
    high |= low
    out[:, 1] = high.astype(np.uint8).reshape(-1).view(unit)


def _pack(wide: NDArray[np.uint64], bits: int, codes: Bytes) -> None:
    """Words of eight codes, a byte each, to a stream of 5 or 6 bits each; `wide` is overwritten."""
    for n_codes, dtype in ((1, "<u2"), (2, "<u4")):
        pairs = wide.view(dtype)  # low + high * 2^(8 n): take off what is too much of the high one
        pairs -= (pairs >> 8 * n_codes) * pairs.dtype.type((1 << 8 * n_codes) - (1 << bits * n_codes))
    high = wide >> np.uint64(32)
    wide &= np.uint64(0xFFFFFFFF)
    high <<= np.uint64(4 * bits)
    wide |= high
    _close_ranks(wide, 8 * bits, codes.view("<u8"))


def _close_ranks(words: NDArray[np.uint64], bits: int, out: NDArray[np.uint64]) -> None:
    """The lowest `bits` of each word, without gaps."""
    n_in = 8 if bits == 40 else 4
    n_out = n_in * bits // 64
    sources, targets = words.reshape(-1, n_in), out.reshape(-1, n_out)
    for index in range(n_out):
        first = index * 64 // bits
        offset = first * bits - index * 64  # of the word's first bit: none, or before that of the target
        value = sources[:, first] >> np.uint64(-offset)
        for number in range(first + 1, n_in):
            offset += bits
            if offset >= 64:
                break
            value |= sources[:, number] << np.uint64(offset)
        targets[:, index] = value
