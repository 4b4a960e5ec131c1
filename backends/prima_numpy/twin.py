"""The `int8` twin: what the native kernels do, step by step in plain numpy, to the same bits.

`native/generic.inl` and `attention.inl` are its originals: every sum runs in LANES partial sums whose halves are then
added, every product and sum is a float32 rounding of its own, e^x is the same polynomial, and softmax goes online over
segments of positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_numpy.kv import Pass, Room, read
from prima_numpy.ops import FloatArray, ReferenceOps, written
from prima_numpy.quant import LANES, linear_int8

SEGMENT = 256
"""Positions, counted from 0, whose softmax is one of its own before it is folded into that of those before."""
_ROWS = 16
"""Rows that attend at once: more only take more memory."""
_LOWEST = np.float32(-3e38)
_MAGIC = np.float32(1.5 * 2**23)
"""Adding it rounds to an integer."""
_LOG2_E = np.float32(1.44269504088896341)
_TANH_LINEAR, _TANH_CUBIC = np.float32(1.59576912), np.float32(0.0713548163)
"""Twice sqrt(2 / pi), and 0.044715 times that: of the argument of tanh in gelu."""
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


class Int8Ops(ReferenceOps):
    """`NativeOps` without the native module; right to the bit, and slow."""

    def __init__(self) -> None:
        super().__init__(linear_int8)

    def rms_norm(self, x: FloatArray, gain: FloatArray, eps: float) -> FloatArray:
        runs = x.reshape(-1, len(gain))
        mean_square = _sum(_in_lanes(runs * runs)) / np.float32(len(gain))
        scale = np.float32(1) / np.sqrt(mean_square + np.float32(eps))
        normed: FloatArray = runs * scale[:, None] * gain
        return normed.reshape(x.shape)

    def attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, layer: int, kv: Pass, rule: AttentionRule
    ) -> FloatArray:
        out = np.empty_like(q)
        for start, stop, room, first in written(k, v, layer, kv):
            for row in range(start, stop, _ROWS):
                rows = slice(row, min(row + _ROWS, stop))
                out[rows] = _attend(q[rows], room, kv.head_dim, first + row - start, rule)
        return out

    def swiglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        product: FloatArray = gate / (1 + _exp(0 - gate)) * up
        return product

    def geglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):
            twice = gate * (_TANH_LINEAR + _TANH_CUBIC * (gate * gate))
        product: FloatArray = gate / (1 + _exp(0 - twice)) * up
        return product


def _in_lanes(values: FloatArray) -> FloatArray:
    """[..., n] -> [n / LANES, ..., LANES], zeros behind a ragged end."""
    missing = -values.shape[-1] % LANES
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return np.moveaxis(padded.reshape(*values.shape[:-1], -1, LANES), -2, 0)


def _sum(parts: FloatArray) -> FloatArray:
    """Parts [n, ..., LANES] one after another, then halves of the lanes: [...]."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total += part
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    sums: FloatArray = total[..., 0]
    return sums


def _exp(x: FloatArray) -> FloatArray:
    less_one, k = _exp_parts(x)
    power: FloatArray = np.ldexp(less_one + np.float32(1), k)
    return power


def _tanh(x: FloatArray) -> FloatArray:
    """(e^2x - 1) / (e^2x + 1)"""
    less_one, k = _exp_parts(x + x)
    power: FloatArray = np.ldexp(np.ones_like(less_one), k)
    less_one = less_one * power + (power - 1)
    quotient: FloatArray = less_one / (less_one + 2)
    return quotient


def _exp_parts(x: FloatArray) -> tuple[FloatArray, NDArray[np.int32]]:
    """y and k with e^x = (1 + y) * 2^k by Cephes' expf; x is clamped to [-87, 88]."""
    x = np.minimum(np.float32(88), np.maximum(np.float32(-87), x))
    k = (x * _LOG2_E + _MAGIC) - _MAGIC
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p: FloatArray = np.full_like(r, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = p * r + coefficient
    return p * r * r + r, k.astype(np.int32)


def _attend(q: FloatArray, room: Room, head_dim: int, start: int, rule: AttentionRule) -> FloatArray:
    """Rows q [n, n_heads * head_dim] at positions start, start + 1, ...: online softmax over segments of positions."""
    heads = q.reshape(len(q), len(room.k), -1, 1, head_dim)  # [n, n_kv_heads, group, 1, head_dim]
    own = np.arange(start, start + len(q)).reshape(-1, 1, 1, 1)  # positions
    out = np.zeros_like(heads)
    top, total = np.full_like(out[..., 0], _LOWEST), np.zeros_like(out[..., 0])
    for first, keys, values in _segments(room, max(0, start + 1 - rule.window) if rule.window else 0):
        position = np.arange(first, first + keys.shape[1])
        sees = (position <= own) & (position > own - rule.window) if rule.window else position <= own
        scores = _sum(_in_lanes(heads * keys[:, None])) * np.float32(rule.scale)
        if rule.softcap:
            scores = np.float32(rule.softcap) * _tanh(scores / np.float32(rule.softcap))
        own_top = np.fmax.reduce(scores, axis=3, keepdims=True, where=sees, initial=_LOWEST)
        weights = np.where(sees, _exp(scores - own_top), np.float32(0))
        own_out = np.zeros_like(out)
        for j in range(keys.shape[1]):
            more = own_out + weights[..., j, None, None] * values[:, None, j, None]
            np.copyto(own_out, more, where=sees[..., j, None, None])
        new_top = np.maximum(top, own_top)
        fade, share = _exp(top - new_top), _exp(own_top - new_top)
        total = total * fade + _sum(_in_lanes(weights))[..., None] * share
        out = out * fade[..., None] + own_out * share[..., None]
        top = new_top
    result: FloatArray = out / total[..., None]
    return result.reshape(q.shape)


def _segments(room: Room, seen_from: int) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    """First position, K and V [n_kv_heads, up to SEGMENT, head_dim] as float32, from that of `seen_from` on."""
    for first in range(seen_from // SEGMENT * SEGMENT, room.length, SEGMENT):
        segment = slice(first, min(first + SEGMENT, room.length))
        yield first, read(room.k, segment), read(room.v, segment)
