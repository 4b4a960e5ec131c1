"""Qwen2 (Yang et al. 2024): a Llama whose q, k and v maps have biases. Other pairs rotate too; the spec says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prima_core.arch.llama import LlamaBlock
from prima_core.arch.ops import A, K, W
from prima_core.interfaces import Weight


class Qwen2Block(LlamaBlock[A, W, K]):
    def bind_qkv(self, weights: Mapping[str, Weight]) -> Sequence[W]:
        return [self.ops.matrix(weights[f"attn_{name}.weight"], weights[f"attn_{name}.bias"]) for name in "qkv"]
