"""Plain numpy quantisation to Q4_K and Q6_K, for test models: the `gguf` package can only read these types.

Round to nearest with one scale (and minimum) per sub-block; no search for better scales as llama.cpp's quantizer has.
Only integer operations and IEEE division, so the bytes are the same on every machine.
Layouts: `block_q4_K` and `block_q6_K` in ggml-common.h; `dequantize_row_q4_K` and `_q6_K` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS_PER_BLOCK = 256


def quantize_q4_k(weights: Float32s) -> Bytes:
    """`weights` [rows, columns] f32 as Q4_K blocks [rows, columns / 256 * 144] u8; columns in 256s."""
    q, d, scales, dmin, minima = affine(groups(weights, 8), largest=15, largest_scale=63)
    pairs = q.reshape(-1, 4, 2, 32)  # low nibbles of 32 bytes, then their high nibbles
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.hstack([halves(d), halves(dmin), pack_scales(scales, minima), nibbles])
    return blocks.reshape(weights.shape[0], -1)


def quantize_q6_k(weights: Float32s) -> Bytes:
    """`weights` [rows, columns] f32 as Q6_K blocks [rows, columns / 256 * 210] u8; columns in 256s."""
    x = groups(weights, 16)  # [blocks, 16, 16]
    d, codes = unit_and_codes(np.abs(x).max(axis=2) / np.float32(31), largest=127)
    step = d * codes.astype(np.float32)
    q = np.clip(np.rint(divide(x, step[:, :, None])), -32, 31).astype(np.int8) + np.int8(32)
    # Each half of 128 weights is four runs of 32 that share their high-bit bytes.
    runs = q.view(np.uint8).reshape(-1, 2, 4, 32)
    low, high = runs & 15, runs >> 4
    low_bytes = low[:, :, :2] | low[:, :, 2:] << 4
    high_bytes = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    blocks = np.hstack([low_bytes.reshape(-1, 128), high_bytes.reshape(-1, 64), codes, halves(d)])
    return blocks.reshape(weights.shape[0], -1)


def groups(weights: Float32s, n: int) -> Float32s:
    """[rows, columns] -> [blocks, n, weights of a group]"""
    return weights.reshape(-1, n, WEIGHTS_PER_BLOCK // n)


def affine(x: Float32s, largest: int, largest_scale: int) -> tuple[Bytes, Float32s, Bytes, Float32s, Bytes]:
    """x [blocks, groups, n] as d * scale * q - dmin * minimum: q, d, scales, dmin, minima, q up to `largest`."""
    low = np.minimum(x.min(axis=2), 0)
    scale = (np.maximum(x.max(axis=2), 0) - low) / np.float32(largest)
    d, scales = unit_and_codes(scale, largest_scale)
    dmin, minima = unit_and_codes(-low, largest_scale)
    step = d * scales.astype(np.float32)
    offset = dmin * minima.astype(np.float32)
    q = np.clip(np.rint(divide(x + offset[:, :, None], step[:, :, None])), 0, largest).astype(np.uint8)
    return q, d, scales, dmin, minima


def unit_and_codes(values: Float32s, largest: int) -> tuple[Float32s, Bytes]:
    """Non-negative `values` [blocks, n] as unit [blocks, 1] (a float16's value) times codes 0..largest."""
    unit = (values.max(axis=1, keepdims=True) / np.float32(largest)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(divide(values, unit)), 0, largest)
    return unit, codes.astype(np.uint8)


def divide(numerator: Float32s, denominator: Float32s) -> Float32s:
    """0 where the denominator is 0: a block of zeros stays one."""
    quotient = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape), np.float32)
    return np.divide(numerator, denominator, out=quotient, where=denominator != 0)


def halves(values: Float32s) -> Bytes:
    return values.astype("<f2").view(np.uint8)


def pack_scales(scales: Bytes, mins: Bytes) -> Bytes:
    """Eight 6-bit scales and minima [blocks, 8] in 12 bytes: the upper two bits of 4..7 ride on 0..3."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.hstack([first, second, third])
