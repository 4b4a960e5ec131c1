"""Rotary position embedding (Su et al. 2021, RoFormer): the angles, made on the host once per pass for every backend.

They are float64: float32 angles lose 1e-3 at position 10^4, and all backends should rotate alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.interfaces import Chunk, Weight
from prima_core.model.names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from prima_core.model.rope import RopeKind, RopeSpec, Yarn

A = TypeVar("A")
Factors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rope(Generic[A]):
    """Cosines and sines [n_tokens, dim / 2] f32 of a pass; they rotate the first `dim` elements of each head.

    They carry the amplitude of the rope: what is rotated is multiplied by it too.
    """

    kind: RopeKind
    head_dim: int
    cos: A
    sin: A


def rope_frequencies(rope: RopeSpec, factors: Factors | None) -> NDArray[np.float64]:
    """Radians per position [dim / 2]: theta^(-2i/dim), divided by `factors` [dim / 2] and by the rope's factor.

    YaRN (Peng et al. 2023, section 3.2): the factor does not hold for the frequencies that its ramp spares.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain = rope.theta**-exponents if factors is None else rope.theta**-exponents / factors
    spared = 0.0 if rope.yarn is None else _yarn_ramp(rope, rope.yarn)
    return plain * ((1 - spared) / rope.factor + spared)


def rope_factors(rope: RopeSpec, shared: Mapping[str, Weight], context: int) -> Factors | None:
    """What divides the frequencies [dim / 2], from the file's shared tensors; None: nothing.

    LongRoPE has two sets. Which one counts depends on the context that is served, as in llama.cpp, and never on how
    long a sequence has become (as in `transformers`): keys in the cache would have been rotated by the other one.
    """
    name = ROPE_FREQS
    if rope.original_context:
        name = ROPE_LONG if context > rope.original_context else ROPE_SHORT
    weight = shared.get(name)
    if weight is None:
        return None
    factors: Factors = np.frombuffer(weight.data, "<f4")
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise ModelError("rope factors must be positive numbers", field=weight.name)
    return factors


def rope_angles(frequencies: NDArray[np.float64], chunks: Iterable[Chunk]) -> NDArray[np.float64]:
    """[n_tokens, dim / 2] radians, for the rows of `chunks`."""
    positions = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
    return np.multiply.outer(np.concatenate(positions), frequencies)


def _yarn_ramp(rope: RopeSpec, yarn: Yarn) -> NDArray[np.float64]:
    """[dim / 2]: 1 where a frequency stays as it is, 0 where it is divided by the factor."""
    low = max(0, math.floor(_yarn_pair(rope, yarn, yarn.beta_fast)))
    high = min(rope.dim - 1, math.ceil(_yarn_pair(rope, yarn, yarn.beta_slow)))
    return 1 - np.clip((np.arange(rope.dim // 2) - low) / max(0.001, high - low), 0, 1)


def _yarn_pair(rope: RopeSpec, yarn: Yarn, n_turns: float) -> float:
    """Which pair, not rounded, turns that often within the original context."""
    return rope.dim * math.log(yarn.original_context / (n_turns * 2 * math.pi)) / (2 * math.log(rope.theta))
