"""Facts about rotary position embedding (Su et al. 2021, RoFormer) and the ways to stretch it, read from metadata.

Linear: Chen et al. 2023. llama3: factors per frequency, carried by the tensor `rope_freqs.weight`. YaRN: Peng et al.
2023. LongRoPE: Ding et al. 2024, factors per frequency in two tensors, one for short and one for long contexts.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum

from prima_core.model.facts import Facts, show
from prima_core.model.names import ROPE_LONG, ROPE_SHORT

SCALINGS = ("none", "linear", "yarn", "longrope")
"""What `rope.scaling.type` may be; llama3's is told by a tensor."""


class RopeKind(StrEnum):
    """Which dimensions rotate together: NORM pairs (2i, 2i+1), NEOX pairs (i, i + dim/2)."""

    NORM = "norm"
    NEOX = "neox"


@dataclass(frozen=True, slots=True)
class Yarn:
    """Frequencies that turn more than `beta_fast` times in `original_context` positions stay as they are, those that
    turn less than `beta_slow` times are divided by the factor, with a ramp between."""

    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` elements of each head.

    `factor` divides frequencies: all of them, or those that `yarn` says. `amplitude` multiplies cosines and sines,
    which makes scores larger by its square. With `original_context` > 0 (LongRoPE) the tensors `rope_factors_short` and
    `rope_factors_long.weight` [dim/2] divide frequencies, the latter where a longer context than that is served.
    """

    dim: int
    theta: float
    factor: float = 1.0
    yarn: Yarn | None = None
    original_context: int = 0
    amplitude: float = 1.0


def read_rope(facts: Facts, head_dim: int, context_length: int, tensors: Container[str]) -> RopeSpec:
    """The rope of a model whose file has `tensors`. Raises ModelError for what would be computed wrongly."""
    dim = facts.count("rope.dimension_count", head_dim, default=head_dim)
    if dim % 2:
        raise facts.error("rope.dimension_count", f"is {dim}; elements rotate in pairs: the number must be even")
    theta = facts.number("rope.freq_base", 1.0, 1e12, default=10000.0)
    scaling = facts.get("rope.scaling.type")
    if scaling is not None and scaling not in SCALINGS:
        raise facts.error("rope.scaling.type", f"rope scaling {show(scaling)} is not supported")
    original = facts.count("rope.scaling.original_context_length", 1 << 28, default=context_length)
    amplitude = facts.number("rope.scaling.attn_factor", 0.0, 1e3, default=1.0)
    if scaling == "longrope" or ROPE_LONG in tensors or ROPE_SHORT in tensors:
        _check_longrope(facts, scaling, tensors)
        return RopeSpec(dim, theta, original_context=original, amplitude=amplitude)
    factor = 1.0 if scaling == "none" else _factor(facts)
    if scaling != "yarn":
        return RopeSpec(dim, theta, factor, amplitude=amplitude)
    return RopeSpec(dim, theta, factor, _yarn(facts, original), amplitude=amplitude * _yarn_amplitude(facts, factor))


def read_local_rope(facts: Facts, rope: RopeSpec) -> RopeSpec | None:
    """The rope of the layers with a sliding window, where it is another than that of the others: it is not scaled."""
    if facts.get("rope.freq_base_swa") is None:
        return None
    return RopeSpec(rope.dim, facts.number("rope.freq_base_swa", 1.0, 1e12))


def _factor(facts: Facts) -> float:
    """A factor without a type means linear, and `rope.scale_linear` is its old name: so llama.cpp reads them."""
    key = "rope.scaling.factor" if facts.get("rope.scaling.factor") is not None else "rope.scale_linear"
    return 1.0 if facts.get(key) == 0.0 else facts.number(key, 0.0, 1e6, default=1.0)


def _check_longrope(facts: Facts, scaling: object, tensors: Container[str]) -> None:
    """The tensors count, as in llama.cpp: converters write no scaling type for phi3."""
    if ROPE_LONG not in tensors or ROPE_SHORT not in tensors:
        raise facts.error("rope.scaling.type", f"LongRoPE needs the tensors {ROPE_LONG} and {ROPE_SHORT}")
    if scaling not in (None, "longrope"):
        raise facts.error("rope.scaling.type", f"is {show(scaling)}, but the file has LongRoPE's {ROPE_LONG}")


def _yarn(facts: Facts, original_context: int) -> Yarn:
    fast = facts.number("rope.scaling.yarn_beta_fast", 0.0, 1e4, default=32.0)
    slow = facts.number("rope.scaling.yarn_beta_slow", 0.0, 1e4, default=1.0)
    if slow >= fast:
        raise facts.error("rope.scaling.yarn_beta_slow", f"is {slow:g}, not less than yarn_beta_fast {fast:g}")
    return Yarn(original_context, fast, slow)


def _yarn_amplitude(facts: Facts, factor: float) -> float:
    """As `transformers` has it: an attention factor that the file states, else 0.1 ln(factor) + 1.

    llama.cpp agrees, but does not look at a stated factor in any of the families here. `yarn_log_multiplier` is
    `mscale_all_dim`, with an `mscale` of 1.
    """
    if facts.get("rope.scaling.yarn_attn_factor") is not None:
        return facts.number("rope.scaling.yarn_attn_factor", 0.0, 1e3)
    if factor <= 1:
        return 1.0
    all_dims = facts.amount("rope.scaling.yarn_log_multiplier", 1e3)
    return (0.1 * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
