"""Matrices, and stacks of the matrices of experts, as they lie on the device; float32 goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import GGUFType
from prima_core.model.unpack import Bytes, Float32s
from prima_mlx.memory import evaluate, is_host_memory
from prima_mlx.quant import GROUP, PACKINGS, Groups, Packing, fill, pieces

PIECE_BYTES = 32 << 20
"""Of a matrix of floats, which are copied to the device at once."""
CAST_WEIGHTS = 1 << 26
"""A product with 16 bit weights widens so many of them at once: 256 MiB of float32."""


class Matrix(Protocol):
    """[outputs, inputs], or [experts, outputs, inputs]."""

    def product(self, x: mx.array) -> mx.array:
        """x @ matrix.T: [n, inputs] -> [n, outputs]."""
        ...

    def of_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        """Each row by its expert's matrix: [n, inputs] and integers [n] in rising order -> [n, outputs]."""
        ...

    def rows(self, ids: Sequence[int]) -> mx.array:
        """[len(ids), inputs]."""
        ...


def upload(weight: Weight) -> Matrix:
    """Raises DeviceMemoryError where there is no room."""
    packing = PACKINGS.get(weight.type)
    return _float_matrix(weight) if packing is None else _packed_matrix(weight, packing)


def refill(matrix: Matrix, weight: Weight) -> None:
    """Write another matrix of the same type and shape in place of one: nobody else may hold its arrays, and nothing
    that was made of them may be left to compute, else MLX writes to a copy. Piece by piece, as `upload` does: a second
    copy of it is never in memory."""
    if isinstance(matrix, PackedMatrix):
        _fill_groups(matrix, weight)
    elif isinstance(matrix, FloatMatrix):
        _fill_floats(matrix, weight)


@dataclass(frozen=True, slots=True)
class GroupScales:
    """scale * code + bias: [rows, inputs / 32] float32; with mxfp4 scales are uint8 and there are no biases."""

    scales: mx.array
    biases: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.scales,) if self.biases is None else (self.scales, self.biases)

    def __getitem__(self, rows: mx.array) -> GroupScales:
        return GroupScales(*(array[rows] for array in self.arrays))


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """MLX's groups of 32. A stack has the rows of all its matrices, one after the other: only as they are, not in
    another shape, can arrays be written to in place.

    Where sixteen codes share a scale there are two sets of scales: x is taken apart into its even and its odd sixteens,
    and each half is multiplied with the same codes by its own set. That is exact, at the price of reading the codes
    twice.
    """

    packing: Packing
    outputs: int
    codes: mx.array  # uint32 [rows, inputs * bits / 32]
    sets: tuple[GroupScales, ...]

    def product(self, x: mx.array) -> mx.array:
        bits, mode = self.packing.bits, self.packing.mode
        return _sum(
            mx.quantized_matmul(part, self.codes, own.scales, own.biases, group_size=GROUP, bits=bits, mode=mode)
            for part, own in self._parts(x)
        )

    def of_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        bits, mode = self.packing.bits, self.packing.mode
        codes, stacks = self._stack(self.codes), (GroupScales(*map(self._stack, own.arrays)) for own in self.sets)
        answers = (
            mx.gather_qmm(
                _part(x, i, len(self.sets))[:, None], codes, own.scales, own.biases, rhs_indices=experts,
                group_size=GROUP, bits=bits, mode=mode, sorted_indices=True,
            )
            for i, own in enumerate(stacks)
        )  # fmt: skip
        return _sum(answers)[:, 0]

    def rows(self, ids: Sequence[int]) -> mx.array:
        where = mx.array(list(ids))
        codes = self.codes[where]
        return _sum(_part(self._values(codes, own[where]), i, len(self.sets)) for i, own in enumerate(self.sets))

    def _stack(self, rows: mx.array) -> mx.array:
        return rows.reshape(-1, self.outputs, rows.shape[1])

    def _values(self, codes: mx.array, own: GroupScales) -> mx.array:
        bits, mode = self.packing.bits, self.packing.mode
        return mx.dequantize(codes, own.scales, own.biases, GROUP, bits, mode, dtype=mx.float32)

    def _parts(self, x: mx.array) -> Iterator[tuple[mx.array, GroupScales]]:
        for i, own in enumerate(self.sets):
            yield _part(x, i, len(self.sets)), own


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """As in the file. 16 bits are widened in each product: MLX would round x, and what comes out, to them else."""

    weights: mx.array  # float32, float16 or bfloat16

    def product(self, x: mx.array) -> mx.array:
        outputs, inputs = self.weights.shape
        step = outputs if self._is_full else max(1, CAST_WEIGHTS // inputs)
        parts = [x @ _full(self.weights[start : start + step]).T for start in range(0, outputs, step)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def of_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        if self._is_full or len(x) > len(self.weights):
            across = _full(self.weights).swapaxes(1, 2)
            return mx.gather_mm(x[:, None], across, rhs_indices=experts, sorted_indices=True)[:, 0]
        return (x[:, None] @ _full(self.weights[experts]).swapaxes(1, 2))[:, 0]  # these are fewer to widen

    def rows(self, ids: Sequence[int]) -> mx.array:
        return _full(self.weights[mx.array(list(ids))])

    @property
    def _is_full(self) -> bool:
        return self.weights.dtype == mx.float32


def _part(x: mx.array, i: int, sets: int) -> mx.array:
    """x [n, inputs] with zeros where another than set `i` holds."""
    if sets == 1:
        return x
    sixteens = x.reshape(len(x), -1, sets, GROUP // sets)
    return mx.where(mx.arange(sets)[:, None] == i, sixteens, 0).reshape(x.shape)


def _sum(parts: Iterator[mx.array]) -> mx.array:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _full(weights: mx.array) -> mx.array:
    return weights.astype(mx.float32)


def _float_matrix(weight: Weight) -> FloatMatrix:
    matrix = FloatMatrix(mx.zeros(weight.shape, _FLOATS[weight.type][1]))
    _fill_floats(matrix, weight)
    return matrix


def _fill_floats(matrix: FloatMatrix, weight: Weight) -> None:
    in_file, held = _FLOATS[weight.type]
    values = weight.data.view(in_file).reshape(weight.shape)
    if is_host_memory() and held != mx.bfloat16:  # which numpy does not know
        evaluate(matrix.weights)
        _written(matrix.weights)[...] = values
        return
    step = max(1, PIECE_BYTES * len(values) // max(1, weight.data.nbytes))
    for start in range(0, len(values), step):
        matrix.weights[start : start + step] = mx.array(values[start : start + step]).view(held)
        evaluate(matrix.weights)


_FLOATS: Mapping[GGUFType, tuple[str, mx.Dtype]] = MappingProxyType(
    {
        GGUFType.F32: ("<f4", mx.float32),
        GGUFType.F16: ("<f2", mx.float16),
        GGUFType.BF16: ("<u2", mx.bfloat16),
    }
)


def _packed_matrix(weight: Weight, packing: Packing) -> PackedMatrix:
    n_rows, n_groups = prod(weight.shape[:-1]), weight.shape[-1] // GROUP
    codes = mx.zeros((n_rows, n_groups * packing.bits), mx.uint32)
    matrix = PackedMatrix(
        packing, weight.shape[-2], codes, tuple(_no_scales(packing, n_rows, n_groups) for _ in range(packing.sets))
    )
    _fill_groups(matrix, weight)
    return matrix


def _fill_groups(matrix: PackedMatrix, weight: Weight) -> None:
    arrays = [matrix.codes, *(array for own in matrix.sets for array in own.arrays)]
    evaluate(*arrays)
    if is_host_memory():
        fill(weight, Groups(_written(matrix.codes), tuple(_views(own) for own in matrix.sets)))
        return
    for start, stop, groups in pieces(weight):
        for array, part in zip(arrays, groups.arrays, strict=True):
            array[start:stop] = mx.array(part)
        evaluate(*arrays)


def _views(scales: GroupScales) -> tuple[Float32s, Float32s] | tuple[Bytes]:
    if scales.biases is None:
        return (_written(scales.scales),)
    return _written(scales.scales), _written(scales.biases)


def _written(array: mx.array) -> NDArray[Any]:
    """A view that writes to the array."""
    return np.array(array, copy=False)


def _no_scales(packing: Packing, n_rows: int, n_groups: int) -> GroupScales:
    if packing.mode == "mxfp4":
        return GroupScales(mx.zeros((n_rows, n_groups), mx.uint8))
    return GroupScales(mx.zeros((n_rows, n_groups)), mx.zeros((n_rows, n_groups)))
