"""The codebooks on a device, in the form that `iquants.py` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from prima_core.model.codebooks import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4, Grid
from prima_core.model.quant import GGUFType


@cache  # a recorded pass goes on reading the table that it was recorded with
def table(type: GGUFType, device: torch.device) -> torch.Tensor | None:
    """Levels as f32, or entries of a grid as words of 16, 32 or 64 bits. None for a type whose codes are numbers."""
    make = _TABLES.get(type)
    return None if make is None else torch.from_numpy(make()).to(device)


def _levels(levels: tuple[int, ...]) -> NDArray[np.float32]:
    return np.array(levels, np.float32)


def _entries(grid: Grid) -> NDArray[np.int32 | np.int64]:
    """The levels of an entry are the bytes of a word, lowest first."""
    levels = np.array(grid.values(), np.int8)
    return levels.view(np.int64 if grid.width == 8 else np.int32)


def _packed(grid: Grid) -> NDArray[np.int16]:
    """An entry is eight times two bits, which stand for the first to third level."""
    return np.frombuffer(bytes.fromhex(grid.packed), np.int16).copy()


_TABLES: Mapping[GGUFType, Callable[[], NDArray[np.float32 | np.int16 | np.int32 | np.int64]]] = MappingProxyType(
    {
        GGUFType.IQ1_S: partial(_packed, IQ1),
        GGUFType.IQ1_M: partial(_packed, IQ1),
        GGUFType.IQ2_XXS: partial(_entries, IQ2_XXS),
        GGUFType.IQ2_XS: partial(_entries, IQ2_XS),
        GGUFType.IQ2_S: partial(_entries, IQ2_S),
        GGUFType.IQ3_XXS: partial(_entries, IQ3_XXS),
        GGUFType.IQ3_S: partial(_entries, IQ3_S),
        GGUFType.IQ4_NL: partial(_levels, IQ4_NL),
        GGUFType.IQ4_XS: partial(_levels, IQ4_NL),
        GGUFType.MXFP4: partial(_levels, MXFP4),
    }
)
