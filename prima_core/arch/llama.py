"""Llama (Touvron et al. 2023): RMSNorm, rotary grouped-query attention, SwiGLU, and a residual around each half.

Mistral 7B (Jiang et al. 2023) is one, and so is Mixtral (Jiang et al. 2024), with experts for SwiGLU: their files say
`llama`. Newer checkpoints of that house become files that say `mistral3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Generic

from prima_core.arch.family import Family, Shapes
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.parts import (
    Attention,
    Mixture,
    SwiGlu,
    attention_biases,
    attention_shapes,
    gated_shapes,
    mixture_shapes,
    norms,
)
from prima_core.arch.rope import Rope
from prima_core.arch.slots import Binder
from prima_core.interfaces import Weight
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec


class LlamaBlock(Generic[A, W, K]):
    """One layer: x [n_tokens, d_model] -> [n_tokens, d_model]."""

    def __init__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, layer: int, weights: Mapping[str, Weight]
    ) -> None:
        self.attention = Attention(ops, binder, model, layer, weights)
        self.feed_forward = (
            Mixture(ops, binder, model, weights) if model.experts else SwiGlu(ops, binder, model, weights)
        )

    def __call__(self, x: A, rope: Rope[A], kv: K) -> A:
        return self.feed_forward.added(self.attention.added(x, rope, kv))


def llama_shapes(model: ModelSpec) -> Shapes:
    feed_forward = mixture_shapes(model) if model.experts else gated_shapes(model)
    return norms(model, "attn_norm", "ffn_norm") | attention_shapes(model) | feed_forward


def _biases(model: ModelSpec) -> Shapes:
    d, d_ff = model.d_model, model.d_ff
    dense = {"ffn_gate.bias": (d_ff,), "ffn_up.bias": (d_ff,), "ffn_down.bias": (d,)}
    return attention_biases(model) | {"attn_output.bias": (d,)} | ({} if model.experts else dense)


LLAMA = Family(
    "llama",
    RopeKind.NORM,
    llama_shapes,
    LlamaBlock,
    optional=_biases,
    defaults=MappingProxyType({"expert_count": 0}),
)
MISTRAL3 = replace(LLAMA, name="mistral3")
