"""The model families that prima runs, by the name that GGUF files use (`general.architecture`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from prima_core.arch.llama import LlamaBlock
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.qwen2 import Qwen2Block
from prima_core.arch.rope import Rope
from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model.spec import ModelSpec

# A layer with its weights bound: writes the pass's K and V, gives the activation [n_tokens, d_model] after the layer.
Block = Callable[[A, Rope[A], K], A]


class Family(Protocol):
    """Binds a layer's weights (by name without the `blk.N.` prefix) to ops."""

    def __call__(
        self, ops: Ops[A, W, K], model: ModelSpec, layer: int, weights: Mapping[str, Weight]
    ) -> Block[A, K]: ...


FAMILIES: Mapping[str, Family] = MappingProxyType({"llama": LlamaBlock, "qwen2": Qwen2Block})


def family(arch: str) -> Family:
    """Raises ModelError for an architecture that nobody has written yet."""
    if arch not in FAMILIES:
        raise ModelError(
            f"{arch!r} is not supported", field="general.architecture", hint=f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[arch]
