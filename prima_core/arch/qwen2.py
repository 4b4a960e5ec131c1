"""Qwen2 (Yang et al. 2024): a Llama whose q, k and v maps have biases, and whose heads rotate in halves."""

from __future__ import annotations

from prima_core.arch.family import Family, Shapes
from prima_core.arch.llama import LlamaBlock, llama_shapes
from prima_core.arch.parts import attention_biases
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec


def _shapes(model: ModelSpec) -> Shapes:
    return llama_shapes(model) | attention_biases(model)


QWEN2 = Family("qwen2", RopeKind.NEOX, _shapes, LlamaBlock)
