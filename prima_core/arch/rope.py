"""Rotary position embedding (Su et al. 2021, RoFormer): the angles, made on the host once per pass for every backend.

They are float64: float32 angles lose 1e-3 at position 10^4, and all backends should rotate alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Chunk
from prima_core.model.spec import RopeKind, RopeSpec

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Rope(Generic[A]):
    """Cosines and sines [n_tokens, dim / 2] f32 of a pass; they rotate the first `dim` elements of each head."""

    kind: RopeKind
    head_dim: int
    cos: A
    sin: A


def rope_frequencies(rope: RopeSpec, factors: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Radians per position [dim / 2]: theta^(-2i/dim), divided by `linear_factor` and by `factors` [dim / 2]."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    frequencies = rope.theta**-exponents / rope.linear_factor
    return frequencies if factors is None else frequencies / factors


def rope_angles(frequencies: NDArray[np.float64], chunks: Iterable[Chunk]) -> NDArray[np.float64]:
    """[n_tokens, dim / 2] radians, for the rows of `chunks`."""
    positions = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
    return np.multiply.outer(np.concatenate(positions), frequencies)
