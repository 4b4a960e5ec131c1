"""Gemma 2 (Gemma Team 2024) and Gemma 3 (2025): norms behind each half too, GeGLU, layers that see a window only.

Gemma 2 caps scores and logits; Gemma 3 norms heads instead, and its layers with a window rotate by a base of their own.
Files hold gains as they are multiplied: 1 more than in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Generic

from prima_core.arch.family import Family, Shapes
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.parts import Attention, GeGlu, attention_shapes, gated_shapes, head_norms, norms
from prima_core.arch.rope import Rope
from prima_core.arch.slots import Binder
from prima_core.interfaces import Weight
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec

_N_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


class GemmaBlock(Generic[A, W, K]):
    """One layer: x [n_tokens, d_model] -> [n_tokens, d_model]."""

    def __init__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, layer: int, weights: Mapping[str, Weight]
    ) -> None:
        self.ops, self.eps = ops, model.norm_eps
        self.attention = Attention(ops, binder, model, layer, weights, scale=attention_scale(model))
        self.attn_post_norm = binder.vector(weights["post_attention_norm.weight"])
        self.feed_forward = GeGlu(ops, binder, model, weights)
        self.ffn_post_norm = binder.vector(weights["post_ffw_norm.weight"])

    def __call__(self, x: A, rope: Rope[A], kv: K) -> A:
        ops = self.ops
        x = ops.add(x, ops.rms_norm(self.attention(x, rope, kv), self.attn_post_norm, self.eps))
        return ops.add(x, ops.rms_norm(self.feed_forward(x), self.ffn_post_norm, self.eps))


def attention_scale(model: ModelSpec) -> float:
    """1 / sqrt(head_dim), but 1 / sqrt(d_model / n_heads) in the models of 27B.

    Files do not say it (`query_pre_attn_scalar` in `transformers`): llama.cpp too knows those by their layers.
    """
    is_27b = model.n_layers == _N_LAYERS_27B[model.arch]
    return float((model.d_model / model.n_heads if is_27b else model.head_dim) ** -0.5)


def _gemma2(model: ModelSpec) -> Shapes:
    all_norms = norms(model, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    return all_norms | attention_shapes(model) | gated_shapes(model)


def _gemma3(model: ModelSpec) -> Shapes:
    return _gemma2(model) | head_norms(model)


GEMMA2 = Family(
    "gemma2",
    RopeKind.NEOX,
    _gemma2,
    GemmaBlock,
    defaults=MappingProxyType(
        {
            "attention.sliding_window": 4096,
            "attention.sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    ),
    scaled_embedding=True,
)
GEMMA3 = Family(
    "gemma3",
    RopeKind.NEOX,
    _gemma3,
    GemmaBlock,
    defaults=MappingProxyType(
        {
            "attention.sliding_window": 0,
            "attention.sliding_window_pattern": 6,
            "final_logit_softcapping": 0.0,
            "rope.freq_base_swa": 10000.0,
        }
    ),
    scaled_embedding=True,
)
