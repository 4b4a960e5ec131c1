"""Qwen3 (Yang et al. 2025): a Llama whose heads of q and k are normed; dense, or with experts in every layer."""

from __future__ import annotations

from types import MappingProxyType

from prima_core.arch.family import Family, Shapes
from prima_core.arch.llama import LlamaBlock, llama_shapes
from prima_core.arch.parts import attention_shapes, head_norms, mixture_shapes, norms
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec


def _dense(model: ModelSpec) -> Shapes:
    return llama_shapes(model) | head_norms(model)


def _mixture(model: ModelSpec) -> Shapes:
    return norms(model, "attn_norm", "ffn_norm") | attention_shapes(model) | head_norms(model) | mixture_shapes(model)


QWEN3 = Family("qwen3", RopeKind.NEOX, _dense, LlamaBlock)
QWEN3MOE = Family(
    "qwen3moe", RopeKind.NEOX, _mixture, LlamaBlock, defaults=MappingProxyType({"expert_count": 0})
)  # fmt: skip
