"""A tensor of quantised blocks, field by field: the bytes of the file in another order, so that loads are aligned.

The blocks of a GGUF file (`ggml-common.h`) are 17 to 210 bytes long, so that neighbours of a field lie at odd
addresses. Here each field of the block (the codes, the scales, ...) is an array of its own over all blocks. Nothing is
requantised and nothing grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from prima_core.model.quant import BLOCKS, GGUFType

_LAYOUTS: Mapping[GGUFType, str] = MappingProxyType(
    {
        GGUFType.F32: "w:4",
        GGUFType.F16: "w:2",
        GGUFType.BF16: "w:2",
        GGUFType.Q4_0: "d:2 qs:16",
        GGUFType.Q4_1: "d:2 m:2 qs:16",
        GGUFType.Q5_0: "d:2 qh:4 qs:16",
        GGUFType.Q5_1: "d:2 m:2 qh:4 qs:16",
        GGUFType.Q8_0: "d:2 qs:32",
        GGUFType.Q2_K: "scales:16 qs:64 d:2 dmin:2",
        GGUFType.Q3_K: "hmask:32 qs:64 scales:12 d:2",
        GGUFType.Q4_K: "d:2 dmin:2 scales:12 qs:128",
        GGUFType.Q5_K: "d:2 dmin:2 scales:12 qh:32 qs:128",
        GGUFType.Q6_K: "ql:128 qh:64 scales:16 d:2",
        GGUFType.IQ1_S: "d:2 qs:32 qh:16",
        GGUFType.IQ1_M: "qs:32 qh:16 scales:8",
        GGUFType.IQ2_XXS: "d:2 qs:64",
        GGUFType.IQ2_XS: "d:2 qs:64 scales:8",
        GGUFType.IQ2_S: "d:2 qs:64 qh:8 scales:8",
        GGUFType.IQ3_XXS: "d:2 qs:96",
        GGUFType.IQ3_S: "d:2 qs:64 qh:8 signs:32 scales:4",
        GGUFType.IQ4_NL: "d:2 qs:16",
        GGUFType.IQ4_XS: "d:2 scales_h:2 scales_l:4 qs:128",
        GGUFType.MXFP4: "e:1 qs:16",
    }
)
"""The fields of a block in the order of the file, with their bytes."""


@dataclass(frozen=True, slots=True)
class Planes:
    """`fields`: by name, uint8 [rows, blocks of a row, bytes of the field], contiguous. A stack of experts has all of
    their rows, one expert after the other."""

    type: GGUFType
    rows: int
    columns: int
    fields: Mapping[str, torch.Tensor]

    @property
    def n_bytes(self) -> int:
        return sum(field.numel() for field in self.fields.values())


def empty(type: GGUFType, rows: int, columns: int, device: torch.device) -> Planes:
    """Room for a matrix, not written yet."""
    n_blocks = columns // BLOCKS[type].n_weights
    fields = {
        name: torch.empty((rows, n_blocks, stop - start), dtype=torch.uint8, device=device)
        for name, start, stop in layout(type)
    }
    return Planes(type, rows, columns, MappingProxyType(fields))


def fill(planes: Planes, first_row: int, data: torch.Tensor) -> None:
    """Write some rows from their bytes as in the file, uint8 [rows * bytes of a row] on the planes' device."""
    blocks = data.reshape(-1, planes.columns // BLOCKS[planes.type].n_weights, BLOCKS[planes.type].n_bytes)
    for name, start, stop in layout(planes.type):
        planes.fields[name][first_row : first_row + len(blocks)] = blocks[:, :, start:stop]


def fill_here(planes: Planes, data: NDArray[np.uint8]) -> None:
    """All rows of planes in the host's memory, from bytes as in the file, which torch would not take read-only."""
    blocks = data.reshape(planes.rows, -1, BLOCKS[planes.type].n_bytes)
    for name, start, stop in layout(planes.type):
        planes.fields[name].numpy()[...] = blocks[:, :, start:stop]


def split(type: GGUFType, rows: int, columns: int, data: torch.Tensor) -> Planes:
    """Planes of `data`, the tensor's bytes as in the file, uint8 [rows * bytes of a row] on any device: a copy."""
    planes = empty(type, rows, columns, data.device)
    fill(planes, 0, data)
    return planes


def part(planes: Planes, start: int, stop: int) -> Planes:
    """Rows [start, stop), a view."""
    fields = {name: field[start:stop] for name, field in planes.fields.items()}
    return Planes(planes.type, stop - start, planes.columns, MappingProxyType(fields))


def layout(type: GGUFType) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and end of each field in a block of the file."""
    start = 0
    for field in _LAYOUTS[type].split():
        name, n_bytes = field.split(":")
        yield name, start, start + int(n_bytes)
        start += int(n_bytes)
