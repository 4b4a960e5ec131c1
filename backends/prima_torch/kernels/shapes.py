"""How the linear kernels cut each type: which lane holds which weight, and the tuning, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from prima_core.model.quant import GGUFType
from prima_torch.kernels.tables import table
from prima_torch.planes import Planes

LANES = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A block of the kernel has segments * per_lane weights; a lane has a segment.

    Where run = min(16, per_lane), weight p of segment s stands at column
    s // split * (per_lane * split) + p // run * (run * split) + s % split * run + p % run.
    """

    segments: int
    per_lane: int
    split: int
    rows: tuple[int, int, int, int]  # of a program, for up to 1, 2, 4 and 8 tokens: as registers allow

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.segments * self.per_lane

    def blocks(self, warps: int) -> int:
        """Of a row, in a step of a program."""
        return warps * LANES // self.segments


@dataclass(frozen=True, slots=True)
class Cut:
    """How the columns of a row are shared out: a warp of a program takes every `warps`-th run of blocks of its part.

    It settles the order in which a row is summed, so it comes of the matrix alone, whatever the number of tokens.
    """

    warps: int
    steps: int  # of a program
    splits: int  # programs for a row; their sums are added by a second kernel


SHAPES: Mapping[GGUFType, Shape] = MappingProxyType(
    {
        GGUFType.F32: Shape(1, 4, 1, (8, 8, 8, 4)),
        GGUFType.F16: Shape(1, 8, 1, (8, 8, 8, 4)),
        GGUFType.BF16: Shape(1, 8, 1, (8, 8, 8, 4)),
        GGUFType.Q4_0: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q4_1: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q5_0: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q5_1: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q8_0: Shape(2, 16, 1, (8, 8, 8, 4)),
        GGUFType.Q2_K: Shape(4, 64, 2, (8, 8, 4, 4)),
        GGUFType.Q3_K: Shape(4, 64, 2, (8, 8, 4, 4)),
        GGUFType.Q4_K: Shape(8, 32, 2, (8, 8, 4, 4)),
        GGUFType.Q5_K: Shape(8, 32, 2, (8, 8, 4, 4)),
        GGUFType.Q6_K: Shape(8, 32, 4, (8, 8, 4, 4)),
        GGUFType.IQ1_S: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ1_M: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ2_XXS: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ2_XS: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ2_S: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ3_XXS: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ3_S: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ4_NL: Shape(1, 32, 1, (4, 4, 2, 2)),
        GGUFType.IQ4_XS: Shape(8, 32, 1, (4, 4, 2, 2)),
        GGUFType.MXFP4: Shape(1, 32, 1, (4, 4, 2, 2)),
    }
)

ARRANGED_TOKENS = 4
"""From this number of tokens on, inputs are put into the order of the lanes first."""

WARPS = 2048
"""Wanted at once: 16 on each of 128 multiprocessors, which then have about 64 KiB on its way from memory."""

MAX_WARPS = 4
"""Of a program."""


def cut(shape: Shape, rows: int, columns: int) -> Cut:
    """Where there are too few rows, first the warps of a program share the columns, then programs do."""
    runs = _cdiv(columns, shape.block * shape.blocks(1))
    wanted = max(1, min(runs, WARPS * shape.rows[0] // rows))
    warps = min(MAX_WARPS, 1 << (wanted.bit_length() - 1))
    steps = _cdiv(runs, wanted // warps * warps)
    return Cut(warps, steps, _cdiv(runs, steps * warps))


def rows_of_program(shape: Shape, cut: Cut, rows: int, tokens: int) -> int:
    """`tokens`: 1, 2, 4 or 8. Fewer than there is room for where a matrix is small."""
    most = shape.rows[tokens.bit_length() - 1]
    while most > 2 and _cdiv(rows, most) * cut.warps * cut.splits < WARPS:
        most //= 2
    return most


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


def pointers(matrix: Planes) -> list[torch.Tensor]:
    """The five field arguments of a kernel: int32 words (int16 or bytes where a field is too short), float16 units; and
    the type's codebook. Any pointer stands for one that a type lacks."""
    fields = [_typed(matrix.type, name, field) for name, field in matrix.fields.items()]
    book = table(matrix.type, fields[0].device)
    return [*fields, *fields[:1] * (5 - len(fields)), fields[0] if book is None else book]


def _typed(type: GGUFType, name: str, field: torch.Tensor) -> torch.Tensor:
    if name == "w":
        return field.view({GGUFType.F32: torch.float32, GGUFType.F16: torch.float16}.get(type, torch.bfloat16))
    if name in ("d", "dmin", "m"):
        return field.view(torch.float16)
    n_bytes = field.shape[-1]
    return field.view(torch.int32 if n_bytes % 4 == 0 else torch.int16 if n_bytes % 2 == 0 else torch.uint8)
