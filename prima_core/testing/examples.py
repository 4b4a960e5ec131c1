"""A tiny model of any family and any type: what kits, fixtures and tests write with `tinymodel.write_tiny_model`.

write_tiny_model(folder / "tiny.gguf", example("gemma2", "Q4_K"))
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from prima_core.testing.tinyspec import Arch, MatrixType, TinyModel, Types

ARCHS: tuple[Arch, ...] = get_args(Arch)
TYPES: tuple[MatrixType, ...] = get_args(MatrixType)

_PLAIN = TinyModel(d_model=256, d_ff=256, vocab_size=320, context_length=256, seed=51)
_MIXTURE = replace(_PLAIN, n_experts=5, n_experts_used=2)
_GEMMA = replace(_PLAIN, window=20, tied_output=True, norm_eps=1e-6)
_EXAMPLES: dict[Arch, TinyModel] = {
    "llama": replace(_PLAIN, rope_scaling="llama3", rope_theta=500000.0),
    "mistral": replace(_PLAIN, n_heads=8, n_kv_heads=1),
    "mistral3": replace(_PLAIN, rope_scaling="yarn", rope_original_context=32, rope_theta=1000.0),
    "mixtral": replace(_MIXTURE, n_kv_heads=4),
    "qwen2": replace(_PLAIN, tied_output=True, norm_eps=1e-6, rope_theta=1e6),
    "qwen3": replace(_PLAIN, head_dim=128, rope_theta=1e6),
    "qwen3moe": replace(_MIXTURE, n_experts_used=3, n_heads=8, rope_theta=1e6),
    "gemma2": replace(_GEMMA, attention_softcap=2.0, logit_softcap=3.0),
    "gemma3": replace(_GEMMA, n_layers=7, rope_theta=1e6, rope_local_theta=100.0),
    "phi3": replace(_PLAIN, rope_scaling="longrope", rope_original_context=32, rotated=0.75, window=40),
}
"""Between them: heads shared by 1 to 8, every rope, windows, softcaps, biases, norms of heads, tied outputs."""


def example(arch: Arch = "llama", types: Types = "F32") -> TinyModel:
    """Rows of 256 weights, so that every type fits; heads of a multiple of 32, so that every KV type does."""
    return replace(_EXAMPLES[arch], arch=arch, types=types)
