"""Quantised weights in numpy: their values, and the `int8` twin of the native products.

`linear_int8` gives the same bits as the native kernels (`native/kernels.h` states the arithmetic), for any number of
rows: sums of integers are exact, and float sums go block by block from the left, one addition at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.model.unpack import UNPACK, Bytes, Codes, Float32s

PIECE_WEIGHTS = 1 << 22
"""A product unpacks about so many weights at once: nothing is dequantised as a whole."""
LANES = 16
"""Partial sums of a product with float weights; the l-th is over columns l, l + 16, ..."""
SMALLEST = np.float32(1e-30)
"""Activations all below this become 0: 127 / largest could overflow."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows of activations as int8: x is about values * scales."""

    values: NDArray[np.int8]  # [n, blocks, block size]
    scales: Float32s  # [n, blocks]


def dequantize(type: GGUFType, data: Bytes, shape: tuple[int, ...]) -> Float32s:
    """The weights as float32 of `shape`; `data` is flat. F32 may be a view. Raises ModelError when the sizes differ."""
    if len(data) != _n_bytes(type, shape):
        raise ModelError(
            f"{len(data)} bytes of {type.name} cannot be a tensor of shape {shape}", hint="the file is damaged"
        )
    if type in UNPACK:
        return _values(UNPACK[type](data.reshape(-1, BLOCKS[type].n_bytes))).reshape(shape)
    return _widen(type, data).reshape(shape)


def dequantize_rows(weight: Weight, rows: Sequence[int] | NDArray[np.int64]) -> Float32s:
    """Rows of a matrix, [len(rows), cols] float32; only these are read. IndexError for a row that is not there."""
    n_rows, cols = weight.shape
    ids = np.asarray(rows, np.int64)
    if np.any(ids < 0):  # numpy would count from the end
        raise IndexError(f"row {ids.min()} of {n_rows}")
    picked = weight.data.reshape(n_rows, -1)[ids]
    return np.array(dequantize(weight.type, picked.reshape(-1), (len(picked), cols)))


def quantize_activation(x: Float32s, block: int) -> Activations:
    """x [n, cols] rounded to int8, each run of `block`, as many as the weights' blocks hold, with its own scale.

    A run that holds NaN or infinity gets zeros with scale NaN, so that what is made of it is NaN too.
    """
    runs = x.reshape(len(x), -1, block)
    largest = np.abs(runs).max(axis=2, initial=0)
    finite = np.isfinite(largest)
    used = finite & (largest >= SMALLEST)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=used)
    rounded = np.rint(np.multiply(runs, inverse[:, :, None], out=np.zeros_like(runs), where=used[:, :, None]))
    scales = np.where(used, largest / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))
    return Activations(rounded.astype(np.int8), scales)


def linear_int8(weight: Weight, x: Float32s, bias: Float32s | None = None) -> Float32s:
    """x [n, cols] . weight [rows, cols] transposed + bias [rows] -> [n, rows]: the bits of `Kernels.linear`.

    With quantised weights activations are rounded to int8; with float weights all is float32.
    """
    rows = weight.shape[0]
    product = _quantised_product if weight.type in UNPACK else _float_product
    out = np.empty((len(x), rows), np.float32)
    if not len(x):  # numpy cannot tell the length of rows that are not there
        return out
    for start, stop, data in _pieces(weight, n=len(x)):
        out[:, start:stop] = product(weight.type, data, x)
    return out if bias is None else out + bias


def _pieces(weight: Weight, n: int) -> Iterator[tuple[int, int, Bytes]]:
    """Row ranges of about PIECE_WEIGHTS weights, or products of that size for many activation rows."""
    rows, cols = weight.shape
    step = max(1, PIECE_WEIGHTS // (cols * max(1, n // LANES)))
    by_row = weight.data.reshape(rows, -1)
    for start in range(0, rows, step):
        yield start, min(rows, start + step), by_row[start : start + step]


def _quantised_product(type: GGUFType, data: Bytes, x: Float32s) -> Float32s:
    """data [rows, bytes per row] -> [n, rows]."""
    block = BLOCKS[type]
    codes = UNPACK[type](data.reshape(-1, block.n_bytes))
    activations = quantize_activation(x, block.n_weights)
    n, n_blocks, _ = activations.values.shape
    out = np.zeros((n, len(data)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # hostile scales may be infinite or NaN
        terms = _block_terms(codes, activations)
        for b in range(n_blocks):
            out += activations.scales[:, b, None] * terms[b]
    return out


def _block_terms(codes: Codes, activations: Activations) -> Float32s:
    """d * sum - dmin * low of each block, [blocks of a row, n, rows]."""
    n, n_blocks, _ = activations.values.shape
    groups, size = codes.values.shape[1:]
    # Matrix products of small integers: every partial sum is below 2^24, so float32 holds it exactly in any order.
    a = activations.values.reshape(n, n_blocks, groups, size).transpose(1, 2, 0, 3).astype(np.float32)
    w = codes.values.reshape(-1, n_blocks, groups, size).transpose(1, 2, 3, 0).astype(np.float32)
    sums = (a @ w).astype(np.int32)  # [blocks, groups, n, rows]
    terms = _by_block(codes.d, n_blocks) * _weigh(sums, codes.scales, n_blocks).astype(np.float32)
    if codes.minima is not None and codes.dmin is not None:
        low = _weigh(a.sum(axis=3).astype(np.int32)[:, :, :, None], codes.minima, n_blocks)
        terms = terms - _by_block(codes.dmin, n_blocks) * low.astype(np.float32)
    return terms


def _weigh(sums: NDArray[np.int32], weights: NDArray[np.int32] | None, n_blocks: int) -> NDArray[np.int32]:
    """sums [blocks, groups, n, rows or 1] times weights [rows * blocks, groups], added up over the groups."""
    if weights is None:
        return sums[:, 0]
    by_group = weights.reshape(-1, n_blocks, weights.shape[1]).transpose(1, 2, 0)[:, :, None, :]
    total: NDArray[np.int32] = np.sum(sums * by_group, axis=1, dtype=np.int32)
    return total


def _by_block(values: Float32s, n_blocks: int) -> Float32s:
    """[rows * blocks] -> [blocks, 1, rows]"""
    return values.reshape(-1, 1, n_blocks).T


def _float_product(type: GGUFType, data: Bytes, x: Float32s) -> Float32s:
    """data [rows, bytes per row] -> [n, rows], summed in LANES partial sums; no BLAS, whose order varies with n."""
    weights = _widen(type, data.reshape(-1)).reshape(len(data), -1)
    missing = -weights.shape[1] % LANES
    w = np.pad(weights, ((0, 0), (0, missing))).reshape(len(data), -1, LANES)
    a = np.pad(x, ((0, 0), (0, missing))).reshape(len(x), 1, -1, LANES)
    lanes = np.zeros((len(x), len(data), LANES), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(w.shape[1]):
            lanes += w[:, i] * a[:, :, i]
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :, :half] + lanes[:, :, half : 2 * half]
    return lanes[:, :, 0]


def _widen(type: GGUFType, data: Bytes) -> Float32s:
    if type == GGUFType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f4" if type == GGUFType.F32 else "<f2").astype(np.float32, copy=False)


def _values(codes: Codes) -> Float32s:
    """[blocks, weights per block], multiplied in the order of ggml's reference."""
    with np.errstate(invalid="ignore", over="ignore"):
        step = codes.d[:, None] if codes.scales is None else codes.d[:, None] * codes.scales.astype(np.float32)
        values = step[:, :, None] * codes.values.astype(np.float32)
        if codes.minima is not None and codes.dmin is not None:
            values -= (codes.dmin[:, None] * codes.minima.astype(np.float32))[:, :, None]
    return values.reshape(len(values), -1)


def _n_bytes(type: GGUFType, shape: tuple[int, ...]) -> int:
    block, count = BLOCKS[type], 1
    for size in shape:
        count *= size
    if shape and shape[-1] % block.n_weights:
        raise ModelError(f"rows of {shape[-1]} weights are not whole blocks of {type.name}", hint="the file is damaged")
    return count // block.n_weights * block.n_bytes
