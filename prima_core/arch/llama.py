"""Llama (Touvron et al. 2023): RMSNorm, rotary grouped-query attention, SwiGLU, and a residual around each half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic

from prima_core.arch.ops import A, AttentionRule, K, Ops, W
from prima_core.arch.rope import Rope
from prima_core.interfaces import Weight
from prima_core.model.spec import ModelSpec


class LlamaBlock(Generic[A, W, K]):
    """One layer: x [n_tokens, d_model] -> [n_tokens, d_model]. `check_tensors` has seen the shapes."""

    def __init__(self, ops: Ops[A, W, K], model: ModelSpec, layer: int, weights: Mapping[str, Weight]) -> None:
        self.ops, self.eps, self.layer = ops, model.norm_eps, layer
        self.rule = AttentionRule(model.head_dim**-0.5)
        self.attn_norm = ops.vector(weights["attn_norm.weight"])
        self.qkv = self.bind_qkv(weights)
        self.output = ops.matrix(weights["attn_output.weight"])
        self.ffn_norm = ops.vector(weights["ffn_norm.weight"])
        self.gate_up = ops.matrix(weights["ffn_gate.weight"]), ops.matrix(weights["ffn_up.weight"])
        self.down = ops.matrix(weights["ffn_down.weight"])

    def bind_qkv(self, weights: Mapping[str, Weight]) -> Sequence[W]:
        return [self.ops.matrix(weights[f"attn_{name}.weight"]) for name in "qkv"]

    def __call__(self, x: A, rope: Rope[A], kv: K) -> A:
        ops = self.ops
        q, k, v = ops.linears(ops.rms_norm(x, self.attn_norm, self.eps), self.qkv)
        heads = ops.attention(ops.rope(q, rope), ops.rope(k, rope), v, self.layer, kv, self.rule)
        x = ops.add(x, ops.linear(heads, self.output))
        gate, up = ops.linears(ops.rms_norm(x, self.ffn_norm, self.eps), self.gate_up)
        return ops.add(x, ops.linear(ops.swiglu(gate, up), self.down))
