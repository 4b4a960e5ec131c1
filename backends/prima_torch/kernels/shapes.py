"""How the linear kernels cut each type: which lane holds which weight, and the tuning, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from prima_core.model.quant import GGUFType
from prima_torch.planes import Planes

LANES = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A block of the kernel has segments * per_lane weights.

    Weight p of segment s stands at column
    s // split * (per_lane * split) + p // run * (run * split) + s % split * run + p % run, where run = min(16, per_lane).
    """

    segments: int
    per_lane: int
    split: int
    rows: tuple[int, int, int, int]  # of a program, for up to 1, 2, 4 and 8 tokens

    @property
    def blocks(self) -> int:
        """Of a row, in a step of a program."""
        return LANES // self.segments

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.segments * self.per_lane

    def rows_for(self, tokens: int) -> int:
        """`tokens`: 1, 2, 4 or 8."""
        return self.rows[tokens.bit_length() - 1]


SHAPES: Mapping[GGUFType, Shape] = MappingProxyType(
    {
        GGUFType.F32: Shape(1, 4, 1, (8, 8, 8, 8)),
        GGUFType.F16: Shape(1, 8, 1, (8, 8, 8, 8)),
        GGUFType.BF16: Shape(1, 8, 1, (8, 8, 8, 8)),
        GGUFType.Q4_0: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q4_1: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q5_0: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q5_1: Shape(1, 32, 1, (8, 8, 4, 4)),
        GGUFType.Q8_0: Shape(2, 16, 1, (8, 8, 8, 8)),
        GGUFType.Q2_K: Shape(4, 64, 2, (8, 8, 4, 4)),
        GGUFType.Q3_K: Shape(4, 64, 2, (8, 8, 4, 4)),
        GGUFType.Q4_K: Shape(8, 32, 2, (8, 8, 4, 4)),
        GGUFType.Q5_K: Shape(8, 32, 2, (8, 8, 4, 4)),
        GGUFType.Q6_K: Shape(8, 32, 4, (8, 8, 4, 4)),
    }
)

ARRANGED_TOKENS = 4
"""From this number of tokens on, inputs are put into the order of the lanes first."""

PROGRAMS = 2048
"""Wanted at once: 16 warps on each of 128 multiprocessors. Fewer rows are made up for by splitting the columns."""

ROWS_FOR_SPLITS = 8
"""Rows that a program is taken to have when columns are split: one number for all tokens, so that a row's sums are the same
for any number of tokens."""


def steps_of_split(shape: Shape, rows: int, columns: int) -> int:
    """Steps of the loop over a row that one program makes, of all that it takes."""
    steps = -(-columns // (shape.block * shape.blocks))
    splits = max(1, min(steps, PROGRAMS * ROWS_FOR_SPLITS // rows))
    return -(-steps // splits)


def pointers(matrix: Planes) -> list[torch.Tensor]:
    """The five field arguments of a kernel: int32 words (int16 or bytes where a field is too short), float16 units."""
    fields = [_typed(matrix.type, name, field) for name, field in matrix.fields.items()]
    return fields + fields[:1] * (5 - len(fields))


def _typed(type: GGUFType, name: str, field: torch.Tensor) -> torch.Tensor:
    if name == "w":
        return field.view({GGUFType.F32: torch.float32, GGUFType.F16: torch.float16}.get(type, torch.bfloat16))
    if name in ("d", "dmin", "m"):
        return field.view(torch.float16)
    n_bytes = field.shape[-1]
    return field.view(torch.int32 if n_bytes % 4 == 0 else torch.int16 if n_bytes % 2 == 0 else torch.uint8)
