"""bench/accuracy.py: codes put together to blocks: the other way round of `prima_core.model.unpack`, for the types that
neither the `gguf` package nor `prima_core.testing.kquants` packs. Arrays begin with [blocks, ...]."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prima_core.testing.kquants import Bytes, Float32s, halves, pack_scales

Codes = NDArray[np.integer[Any]]  # of any width
Word = TypeVar("Word", np.uint8, np.uint16, np.uint32)

# ---------------------------------------------------------------- K types


def pack_q2_k(q: Codes, d: Float32s, scales: Codes, dmin: Float32s, minima: Codes) -> Bytes:
    """q [16, 16] of 0 to 3, scales and minima [16] of 0 to 15."""
    fields = _or(_bytes(q).reshape(-1, 2, 4, 32), axis=2, bits=2).reshape(-1, 64)
    return np.hstack([_bytes(scales | minima << 4), fields, halves(d), halves(dmin)])


def pack_q3_k(q: Codes, d: Float32s, scales: Codes) -> Bytes:
    """q [16, 16] of 0 to 7, scales [16] of 0 to 63."""
    high = _or(_bytes(q >> 2).reshape(-1, 8, 32), axis=1, bits=1)
    low = _or(_bytes(q & 3).reshape(-1, 2, 4, 32), axis=2, bits=2).reshape(-1, 64)
    low_scales = _or(_bytes(scales & 15).reshape(-1, 2, 8), axis=1, bits=4)
    high_scales = _or(_bytes(scales >> 4).reshape(-1, 4, 4), axis=1, bits=2)
    return np.hstack([high, low, low_scales, high_scales, halves(d)])


def pack_q5_k(q: Codes, d: Float32s, scales: Bytes, dmin: Float32s, minima: Bytes) -> Bytes:
    """q [8, 32] of 0 to 31, scales and minima [8] of 0 to 63."""
    fifth = _or(_bytes(q >> 4), axis=1, bits=1)
    low = _or(_bytes(q & 15).reshape(-1, 4, 2, 32), axis=2, bits=4).reshape(-1, 128)
    return np.hstack([halves(d), halves(dmin), pack_scales(scales, minima), fifth, low])


# ---------------------------------------------------------------- IQ4


def pack_iq4_nl(index: Codes, d: Float32s) -> Bytes:
    """index [1, 32] of 0 to 15."""
    return np.hstack([halves(d), _nibbles(index).reshape(-1, 16)])


def pack_iq4_xs(index: Codes, d: Float32s, scales: Codes) -> Bytes:
    """index [8, 32] of 0 to 15, scales [8] of 0 to 63."""
    high = _or((scales >> 4).astype(np.uint16), axis=1, bits=2)
    return np.hstack([halves(d), _raw(high[:, None]), _pairs(scales & 15), _nibbles(index).reshape(-1, 128)])


# ---------------------------------------------------------------- grids: index by entry, signs [32] bytes


def pack_iq2_xxs(index: Codes, signs: Bytes, d: Float32s, scales: Codes) -> Bytes:
    words = _or((signs & 127).astype(np.uint32).reshape(-1, 8, 4), axis=2, bits=7) | scales.astype(np.uint32) << 28
    entries = _bytes(index).reshape(-1, 8, 4)
    return np.hstack([halves(d), np.concatenate([entries, _raw(words[:, :, None])], axis=2).reshape(-1, 64)])


def pack_iq2_xs(index: Codes, signs: Bytes, d: Float32s, scales: Codes) -> Bytes:
    words = index.astype(np.uint16) | (signs & 127).astype(np.uint16) << 9
    return np.hstack([halves(d), _raw(words), _pairs(scales)])


def pack_iq2_s(index: Codes, signs: Bytes, d: Float32s, scales: Codes) -> Bytes:
    high = _or(_bytes(index >> 8).reshape(-1, 8, 4), axis=2, bits=2)
    return np.hstack([halves(d), _bytes(index & 255), signs, high, _pairs(scales)])


def pack_iq3_xxs(index: Codes, signs: Bytes, d: Float32s, scales: Codes) -> Bytes:
    words = _or((signs & 127).astype(np.uint32).reshape(-1, 8, 4), axis=2, bits=7) | scales.astype(np.uint32) << 28
    return np.hstack([halves(d), _bytes(index), _raw(words)])


def pack_iq3_s(index: Codes, signs: Bytes, d: Float32s, scales: Codes) -> Bytes:
    high = np.packbits(_bytes(index >> 8), axis=1, bitorder="little")
    return np.hstack([halves(d), _bytes(index & 255), high, signs, _pairs(scales)])


def pack_iq1_s(index: Codes, is_minus: Codes, d: Float32s, scales: Codes) -> Bytes:
    """is_minus [8]: of the offset of each group."""
    words = _or((index >> 8).astype(np.uint16).reshape(-1, 8, 4), axis=2, bits=3)
    words |= scales.astype(np.uint16) << 12 | is_minus.astype(np.uint16) << 15
    return np.hstack([halves(d), _bytes(index & 255), _raw(words)])


def pack_iq1_m(index: Codes, is_minus: Codes, d: Float32s, scales: Codes) -> Bytes:
    """is_minus [32]: of the offset of each entry."""
    words = _or(scales.astype(np.uint16).reshape(-1, 4, 4), axis=2, bits=3)
    words |= (halves(d).view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    return np.hstack([_bytes(index & 255), _pairs(index >> 8 | is_minus << 3), _raw(words)])


# ---------------------------------------------------------------- bits


def _bytes(codes: Codes) -> Bytes:
    return codes.astype(np.uint8)


def _raw(words: Codes) -> Bytes:
    """[..., words] -> [..., bytes]"""
    return np.ascontiguousarray(words).view(np.uint8)


def _or(codes: NDArray[Word], axis: int, bits: int) -> NDArray[Word]:
    """The codes along `axis` in one: the first lowest, each so many bits further up."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    shifts = (np.arange(codes.shape[axis]) * bits).astype(codes.dtype).reshape(shape)
    packed: NDArray[Word] = np.bitwise_or.reduce(codes << shifts, axis=axis)
    return packed


def _pairs(nibbles: Codes) -> Bytes:
    """[2 k] -> [k]: neighbours share a byte, the first of them its low half."""
    return _or(_bytes(nibbles).reshape(len(nibbles), -1, 2), axis=2, bits=4)


def _nibbles(codes: Codes) -> Bytes:
    """[..., 2 k] -> [..., k]: the first half of the codes are low halves."""
    return _or(_bytes(codes).reshape(*codes.shape[:-1], 2, -1), axis=codes.ndim - 1, bits=4)
