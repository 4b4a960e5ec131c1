"""Halves of a block that families share: rotary attention, gated feed-forward maps, mixtures of experts.

Each takes the residual x [n_tokens, d_model], norms it, and gives what is to be added to it; `added` adds it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

from prima_core.arch.family import Shapes
from prima_core.arch.fused import Gating, fused
from prima_core.arch.ops import A, AttentionRule, K, Ops, RoutingRule, W
from prima_core.arch.rope import Rope
from prima_core.arch.slots import Binder
from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model.spec import ModelSpec


def attention_shapes(model: ModelSpec) -> Shapes:
    """Separate maps for q, k and v."""
    d, d_q, d_kv = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return {
        "attn_q.weight": (d_q, d),
        "attn_k.weight": (d_kv, d),
        "attn_v.weight": (d_kv, d),
        "attn_output.weight": (d, d_q),
    }


def attention_biases(model: ModelSpec) -> Shapes:
    """Of q, k and v."""
    d_q, d_kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return {"attn_q.bias": (d_q,), "attn_k.bias": (d_kv,), "attn_v.bias": (d_kv,)}


def head_norms(model: ModelSpec) -> Shapes:
    """Each head of q and of k is normed before it rotates."""
    return {"attn_q_norm.weight": (model.head_dim,), "attn_k_norm.weight": (model.head_dim,)}


def norms(model: ModelSpec, *names: str) -> Shapes:
    return {f"{name}.weight": (model.d_model,) for name in names}


def gated_shapes(model: ModelSpec) -> Shapes:
    d, d_ff = model.d_model, model.d_ff
    return {"ffn_gate.weight": (d_ff, d), "ffn_up.weight": (d_ff, d), "ffn_down.weight": (d, d_ff)}


def mixture_shapes(model: ModelSpec) -> Shapes:
    """Raises ModelError for a model without experts."""
    if model.experts is None:
        raise ModelError(f"is 0 or missing; {model.arch} models have experts", field=f"{model.arch}.expert_count")
    d, d_ff, n = model.d_model, model.experts.d_ff, model.experts.count
    return {
        "ffn_gate_inp.weight": (n, d),
        "ffn_gate_exps.weight": (n, d_ff, d),
        "ffn_up_exps.weight": (n, d_ff, d),
        "ffn_down_exps.weight": (n, d, d_ff),
    }


def bind_linear(binder: Binder[A, W], weights: Mapping[str, Weight], name: str) -> W:
    """The map `name`, with its bias where the layer has one."""
    return binder.matrix(weights[f"{name}.weight"], weights.get(f"{name}.bias"))


class Attention(Generic[A, W, K]):
    """Rotary grouped-query attention, with biases and norms of heads where the layer has them."""

    def __init__(
        self,
        ops: Ops[A, W, K],
        binder: Binder[A, W],
        model: ModelSpec,
        layer: int,
        weights: Mapping[str, Weight],
        scale: float = 0.0,
    ) -> None:
        self.ops, self.fused, self.eps, self.layer = ops, fused(ops), model.norm_eps, layer
        self.rule = AttentionRule(scale or model.head_dim**-0.5, model.attention_softcap, model.window(layer))
        self.norm = binder.vector(weights["attn_norm.weight"])
        self.qkv = [bind_linear(binder, weights, f"attn_{name}") for name in "qkv"]
        has_norms = "attn_q_norm.weight" in weights
        self.head_norms = [binder.vector(weights[f"attn_{name}_norm.weight"]) for name in "qk"] if has_norms else None
        self.output = bind_linear(binder, weights, "attn_output")

    def __call__(self, x: A, rope: Rope[A], kv: K) -> A:
        return self.ops.linear(self.heads(x, rope, kv), self.output)

    def added(self, x: A, rope: Rope[A], kv: K) -> A:
        return self.fused.added_linear(self.heads(x, rope, kv), self.output, to=x)

    def heads(self, x: A, rope: Rope[A], kv: K) -> A:
        ops = self.ops
        q, k, v = self.fused.normed_linears(x, self.norm, self.eps, self.qkv)
        if self.head_norms is not None:
            q, k = (ops.rms_norm(heads, gain, self.eps) for heads, gain in zip((q, k), self.head_norms, strict=True))
        return self.fused.rotated_attention(q, k, v, rope, self.layer, kv, self.rule)


class SwiGlu(Generic[A, W, K]):
    """down(silu(gate(x)) * up(x)); Shazeer 2020."""

    gating = Gating.SWIGLU

    def __init__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, weights: Mapping[str, Weight]
    ) -> None:
        self.ops, self.fused, self.eps = ops, fused(ops), model.norm_eps
        self.norm = binder.vector(weights["ffn_norm.weight"])
        self.gate, self.up, self.down = (bind_linear(binder, weights, f"ffn_{name}") for name in ("gate", "up", "down"))

    def __call__(self, x: A) -> A:
        return self.ops.linear(self.hidden(x), self.down)

    def added(self, x: A) -> A:
        return self.fused.added_linear(self.hidden(x), self.down, to=x)

    def hidden(self, x: A) -> A:
        return self.fused.gated(x, self.norm, self.eps, self.gate, self.up, self.gating)


class GeGlu(SwiGlu[A, W, K]):
    """down(gelu(gate(x)) * up(x))."""

    gating = Gating.GEGLU


class Mixture(Generic[A, W, K]):
    """A router and the answers of the experts that it chooses, whose weights add up to 1."""

    def __init__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, weights: Mapping[str, Weight]
    ) -> None:
        self.ops, self.eps = ops, model.norm_eps
        self.norm = binder.vector(weights["ffn_norm.weight"])
        self.rule = RoutingRule(model.experts.n_used if model.experts else 0)
        self.router = binder.matrix(weights["ffn_gate_inp.weight"])
        self.experts = [binder.matrix(weights[f"ffn_{name}_exps.weight"]) for name in ("gate", "up", "down")]

    def added(self, x: A) -> A:
        gate, up, down = self.experts
        normed = self.ops.rms_norm(x, self.norm, self.eps)
        return self.ops.add(
            x, self.ops.mixture(normed, self.ops.linear(normed, self.router), gate, up, down, self.rule)
        )
