"""Several operations of a block in one call, for backends in which a call costs more than a small operation does.

A backend may have them or not: `fused(ops)` gives its own, or makes them of the fifteen of `Ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar, runtime_checkable

from prima_core.arch.ops import A, AttentionRule, K, Ops, W
from prima_core.arch.rope import Rope

W_contra = TypeVar("W_contra", contravariant=True)
K_contra = TypeVar("K_contra", contravariant=True)


class Gating(StrEnum):
    """By which operation of `Ops` a gate acts."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"


@runtime_checkable
class FusedOps(Protocol[A, W_contra, K_contra]):
    """Methods of the same object that has those of `Ops`, and all four or none. Each gives what the operations that
    `Unfused` makes it of would give, to the bit."""

    def normed_linears(self, x: A, gain: A, eps: float, matrices: Sequence[W_contra]) -> Sequence[A]:
        """`linears` of rms_norm(x, gain, eps)."""
        ...

    def gated(self, x: A, gain: A, eps: float, gate: W_contra, up: W_contra, gating: Gating) -> A:
        """The gate of rms_norm(x, gain, eps), acting on its `up`."""
        ...

    def rotated_attention(self, q: A, k: A, v: A, rope: Rope[A], layer: int, kv: K_contra, rule: AttentionRule) -> A:
        """`attention` of q and k after `rope`; both may be overwritten."""
        ...

    def added_linear(self, x: A, matrix: W_contra, to: A) -> A:
        """to + linear(x, matrix). `to` is not overwritten."""
        ...


class Unfused(Generic[A, W, K]):
    """`FusedOps` made of the operations of any backend."""

    def __init__(self, ops: Ops[A, W, K]) -> None:
        self._ops = ops

    def normed_linears(self, x: A, gain: A, eps: float, matrices: Sequence[W]) -> Sequence[A]:
        return self._ops.linears(self._ops.rms_norm(x, gain, eps), matrices)

    def gated(self, x: A, gain: A, eps: float, gate: W, up: W, gating: Gating) -> A:
        gates, ups = self.normed_linears(x, gain, eps, [gate, up])
        return (self._ops.swiglu if gating is Gating.SWIGLU else self._ops.geglu)(gates, ups)

    def rotated_attention(self, q: A, k: A, v: A, rope: Rope[A], layer: int, kv: K, rule: AttentionRule) -> A:
        ops = self._ops
        return ops.attention(ops.rope(q, rope), ops.rope(k, rope), v, layer, kv, rule)

    def added_linear(self, x: A, matrix: W, to: A) -> A:
        return self._ops.add(to, self._ops.linear(x, matrix))


def fused(ops: Ops[A, W, K]) -> FusedOps[A, W, K]:
    """The backend's own, or `Unfused`."""
    return ops if isinstance(ops, FusedOps) else Unfused(ops)
