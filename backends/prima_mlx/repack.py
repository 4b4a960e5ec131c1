"""The types of most models, repacked at once: what `quant.py` does for any type, in a tenth of the time.

A streamed tensor is repacked in every pass, so this is worth its own way: bits are moved within words of up to eight
codes, never one by one, and no code has a byte of its own longer than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.model.quant import GGUFType
from prima_core.model.unpack import Bytes, Float32s

Words = NDArray[np.unsignedinteger[Any]]
U64s = NDArray[np.uint64]
Sets = tuple[tuple[Float32s, Float32s], ...]


class Scratch:
    """Arrays that are used again and again: fresh ones cost more, in page faults, than what is computed in them."""

    def __init__(self) -> None:
        self._held: dict[int, Bytes] = {}

    def __call__(self, number: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """What was in it is of no use any more."""
        n_bytes = prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(number)
        if held is None or len(held) < n_bytes:
            held = self._held[number] = np.empty(n_bytes, np.uint8)
        return held[:n_bytes].view(dtype).reshape(shape)


Repack = Callable[[Bytes, Bytes, Sets, Scratch], None]
"""Blocks [n, bytes] -> codes, uint8 [n * bytes], and for each set scales and biases, float32 [n * groups]: all are
written in place."""


def _q4_0(blocks: Bytes, codes: Bytes, sets: Sets, scratch: Scratch) -> None:
    """Sixteen low nibbles, then the sixteen high ones."""
    words = blocks.view("<u2")
    [(scales, biases)] = sets
    _half(words[:, 0], scales)
    np.multiply(scales, np.float32(-8), out=biases)
    _pack_nibbles(words[:, 1:], codes, "<f8", scratch)


def _q4_k(blocks: Bytes, codes: Bytes, sets: Sets, scratch: Scratch) -> None:
    """Four times 32 low nibbles, then the 32 high ones."""
    _scale_with_minima(blocks, sets)
    _pack_nibbles(blocks.view("<u2")[:, 8:], codes, "<c16", scratch)


def _q5_k(blocks: Bytes, codes: Bytes, sets: Sets, scratch: Scratch) -> None:
    """As Q4_K; the fifth bits of the eight groups are in the bits of the same 32 bytes."""
    _scale_with_minima(blocks, sets)
    n = len(blocks)
    fifth, nibbles = scratch(0, (n, 4), "<u8"), scratch(1, (n, 16), "<u8")  # eight codes in a word
    fifth[:], nibbles[:] = blocks.view("<u8")[:, 2:6], blocks.view("<u8")[:, 6:]
    wide, bits = scratch(2, (n, 8, 4), "<u8"), scratch(3, (n, 4), "<u8")
    by_group = nibbles.reshape(n, 4, 4)
    np.bitwise_and(by_group, _each(0x0F), out=wide[:, 0::2])
    np.right_shift(by_group, np.uint64(4), out=by_group)
    np.bitwise_and(by_group, _each(0x0F), out=wide[:, 1::2])
    for group in range(8):
        _moved(fifth, 4 - group, bits)
        bits &= _each(0x10)
        wide[:, group] |= bits
    _pack(wide.reshape(-1), 5, codes, scratch)


def _q6_k(blocks: Bytes, codes: Bytes, sets: Sets, scratch: Scratch) -> None:
    """Two halves of 64 bytes with low bits and 32 with high ones: 32 codes from the low and 32 from the high nibbles of
    each 32 bytes."""
    n = len(blocks)
    d = _half(blocks[:, 208:210].view("<u2")[:, 0], np.empty(n, np.float32))
    own = blocks[:, 192:208].view(np.int8).reshape(n, 8, 2)
    for index, (scales, biases) in enumerate(sets):
        np.multiply(own[:, :, index], d[:, None], out=scales.reshape(n, 8))
        np.multiply(scales, np.float32(-32), out=biases)
    nibbles, pairs = scratch(0, (n, 128), "u1"), scratch(1, (n, 64), "u1")
    nibbles[:], pairs[:] = blocks[:, :128], blocks[:, 128:192]
    of_halves, high = nibbles.view("<u8").reshape(n, 2, 8), pairs.view("<u8").reshape(n, 2, 4)
    wide, bits = scratch(2, (n, 2, 4, 4), "<u8"), scratch(3, (n, 2, 4), "<u8")
    np.bitwise_and(of_halves, _each(0x0F), out=wide[:, :, :2].reshape(n, 2, 8))
    np.right_shift(of_halves, np.uint64(4), out=of_halves)
    np.bitwise_and(of_halves, _each(0x0F), out=wide[:, :, 2:].reshape(n, 2, 8))
    for group in range(4):
        _moved(high, 4 - 2 * group, bits)
        bits &= _each(0x30)
        wide[:, :, group] |= bits
    _pack(wide.reshape(-1), 6, codes, scratch)


def _q8_0(blocks: Bytes, codes: Bytes, sets: Sets, scratch: Scratch) -> None:
    [(scales, biases)] = sets
    _half(blocks[:, :2].view("<u2")[:, 0], scales)
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


def _half(bits: Words, out: Float32s) -> Float32s:
    out[:] = np.ascontiguousarray(bits).view(np.float16)
    return out


def _each(byte: int) -> np.uint64:
    """In all eight bytes of a word."""
    return np.uint64(byte * 0x0101010101010101)


def _moved(words: U64s, places: int, out: U64s) -> None:
    """To the left, or to the right."""
    if places >= 0:
        np.left_shift(words, np.uint64(places), out=out)
    else:
        np.right_shift(words, np.uint64(-places), out=out)


def _scale_with_minima(blocks: Bytes, sets: Sets) -> None:
    """Of Q4_K and Q5_K: d, dmin, and eight scales and minima of 6 bits in the next 12 bytes."""
    [(scales, biases)] = sets
    units, first, second, third = np.ascontiguousarray(blocks.view("<u4")[:, :4].T)
    low, high, nibbles = np.uint32(0x3F3F3F3F), np.uint32(0x30303030), np.uint32(0x0F0F0F0F)
    own, minima = np.empty((len(blocks), 2), "<u4"), np.empty((len(blocks), 2), "<u4")
    own[:, 0], own[:, 1] = first & low, third & nibbles | first >> 2 & high
    minima[:, 0], minima[:, 1] = second & low, third >> 4 & nibbles | second >> 2 & high
    d, dmin = np.ascontiguousarray(units.view(np.float16).astype(np.float32).reshape(-1, 2).T)
    np.multiply(own.view(np.uint8), d[:, None], out=scales.reshape(-1, 8))
    np.multiply(minima.view(np.uint8), -dmin[:, None], out=biases.reshape(-1, 8))


def _pack_nibbles(pairs: Words, codes: Bytes, unit: str, scratch: Scratch) -> None:
    """Bytes with a low and a high nibble, two in a word of 16 bits, to the low nibbles of a unit of words and then its
    high ones. `unit` is a type as large as the codes of half of them: it only moves bytes."""
    words, low, high = (scratch(number, pairs.shape, "<u2") for number in range(3))
    packed, out = scratch(3, pairs.shape, "u1"), codes.view(unit).reshape(-1, 2)
    words[:] = pairs
    for half in range(2):
        np.bitwise_and(words, np.uint16(0x0F0F), out=low)
        np.right_shift(low, np.uint16(4), out=high)
        np.bitwise_or(low, high, out=packed, casting="unsafe")
        out[:, half] = packed.reshape(-1).view(unit)
        if not half:
            np.right_shift(words, np.uint16(4), out=words)


def _pack(wide: U64s, bits: int, codes: Bytes, scratch: Scratch) -> None:
    """Words of eight codes, a byte each, to a stream of 5 or 6 bits each; `wide` is overwritten."""
    spare = scratch(4, wide.shape, "<u8")
    for n_codes, dtype in ((1, "<u2"), (2, "<u4")):
        pairs, high = wide.view(dtype), spare.view(dtype)  # low + high * 2^(8 n): take off what is too much of high
        unsigned = pairs.dtype.type
        np.right_shift(pairs, unsigned(8 * n_codes), out=high)
        np.multiply(high, unsigned((1 << 8 * n_codes) - (1 << bits * n_codes)), out=high)
        np.subtract(pairs, high, out=pairs)
    np.right_shift(wide, np.uint64(32), out=spare)
    np.left_shift(spare, np.uint64(4 * bits), out=spare)
    np.bitwise_and(wide, np.uint64(0xFFFFFFFF), out=wide)
    np.bitwise_or(wide, spare, out=wide)
    _close_ranks(wide, 8 * bits, codes.view("<u8"), scratch)


def _close_ranks(words: U64s, bits: int, out: U64s, scratch: Scratch) -> None:
    """The lowest `bits` of each word, without gaps."""
    n_in = 8 if bits == 40 else 4
    n_out = n_in * bits // 64
    sources, targets = words.reshape(-1, n_in), out.reshape(-1, n_out)
    value, more = (scratch(number, (len(sources),), "<u8") for number in (4, 5))
    for index in range(n_out):
        first = index * 64 // bits
        offset = first * bits - index * 64  # of the word's first bit from that of the target
        np.right_shift(sources[:, first], np.uint64(-offset), out=value)
        for number in range(first + 1, n_in):
            offset += bits
            if offset >= 64:
                break
            np.left_shift(sources[:, number], np.uint64(offset), out=more)
            np.bitwise_or(value, more, out=value)
        targets[:, index] = value
