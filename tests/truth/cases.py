"""Tiny models that between them use every branch of a family: head counts, rope, output, types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prima_core.testing.tinymodel import TinyModel

_LLAMA = TinyModel(d_model=128, d_ff=192, vocab_size=320, context_length=128, seed=31)
_QWEN2 = replace(_LLAMA, arch="qwen2", norm_eps=1e-6, rope_theta=1e6, seed=32)
_LONG_ROWS = TinyModel(vocab_size=320, seed=33)  # K types need rows of a multiple of 256
_QWEN3 = replace(_QWEN2, arch="qwen3", n_layers=3)
_MIXTURE = replace(_LLAMA, n_layers=3, n_experts=8, n_experts_used=2)
_GEMMA = replace(_LLAMA, n_layers=4, head_dim=48, window=9, tied_output=True, norm_eps=1e-6)
_GEMMA2 = replace(_GEMMA, arch="gemma2", attention_softcap=1.0, logit_softcap=3.0)
_GEMMA3 = replace(_GEMMA, arch="gemma3", n_layers=7, rope_theta=1e6, rope_local_theta=100.0)
_PHI3 = replace(_LLAMA, arch="phi3", n_layers=3)
_LONGROPE: dict[str, Any] = {"rope_scaling": "longrope", "rope_original_context": 32}
_YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_original_context": 32, "rope_theta": 1000.0}

CASES: dict[str, TinyModel] = {
    "llama-4-heads": replace(_LLAMA, n_heads=4, n_kv_heads=4),
    "llama-8-heads-share-2": replace(_LLAMA, n_heads=8, n_kv_heads=2, n_layers=3),
    "llama-6-heads-share-1-of-48": replace(_LLAMA, n_heads=6, n_kv_heads=1, head_dim=48, d_model=144),
    "llama-heads-wider-than-model": replace(_LLAMA, head_dim=64),
    "llama-llama3-rope": replace(_LLAMA, rope_scaling="llama3", rope_theta=500000.0),
    "llama-linear-rope": replace(_LLAMA, rope_scaling="linear"),
    "llama-tied": replace(_LLAMA, tied_output=True),
    "llama-tied-llama3-rope-f16": replace(_LLAMA, tied_output=True, rope_scaling="llama3", types="F16"),
    "llama-bf16": replace(_LLAMA, types="BF16"),
    "llama-q8_0": replace(_LLAMA, types="Q8_0"),
    "llama-q4_k": replace(_LONG_ROWS, types="Q4_K"),
    "llama-q6_k": replace(_LONG_ROWS, types="Q6_K"),
    "llama-q4_k_m": replace(_LONG_ROWS, types="Q4_K_M", n_layers=4, tied_output=True),
    "qwen2-4-heads": replace(_QWEN2, n_heads=4, n_kv_heads=4),
    "qwen2-8-heads-share-2": replace(_QWEN2, n_heads=8, n_kv_heads=2, n_layers=3),
    "qwen2-heads-wider-than-model": replace(_QWEN2, head_dim=64),
    "qwen2-linear-rope": replace(_QWEN2, rope_scaling="linear"),
    "qwen2-tied-f16": replace(_QWEN2, tied_output=True, types="F16"),
    "qwen2-q4_k": replace(_LONG_ROWS, arch="qwen2", types="Q4_K"),
    "mistral-8-heads-share-2": replace(_LLAMA, arch="mistral", n_heads=8, n_kv_heads=2, n_layers=3),
    "mistral3-yarn": replace(_LLAMA, arch="mistral3", **_YARN),
    "mixtral-2-of-8": replace(_MIXTURE, arch="mixtral"),
    "mixtral-3-of-4-6-heads-share-1": replace(
        _MIXTURE, arch="mixtral", d_model=144, n_heads=6, n_kv_heads=1, n_experts=4, n_experts_used=3
    ),
    "mixtral-q4_k_m": replace(
        _LONG_ROWS, arch="mixtral", n_layers=3, d_ff=256, n_experts=4, n_experts_used=2, types="Q4_K_M"
    ),
    "qwen3-4-heads": replace(_QWEN3, n_heads=4, n_kv_heads=4),
    "qwen3-8-heads-share-2-of-48": replace(_QWEN3, n_heads=8, n_kv_heads=2, head_dim=48),
    "qwen3-tied-q8_0": replace(_QWEN3, tied_output=True, types="Q8_0"),
    "qwen3moe-3-of-6": replace(_MIXTURE, arch="qwen3moe", n_experts=6, n_experts_used=3, norm_eps=1e-6),
    "qwen3moe-1-of-5-q8_0": replace(_MIXTURE, arch="qwen3moe", n_experts=5, n_experts_used=1, types="Q8_0"),
    "gemma2-4-heads-share-2": _GEMMA2,
    "gemma2-8-heads-share-1": replace(_GEMMA2, n_heads=8, n_kv_heads=1),
    "gemma3-4-heads-share-2": _GEMMA3,
    "gemma3-untied-4-heads": replace(_GEMMA3, n_heads=4, n_kv_heads=4, tied_output=False),
    "gemma3-linear-rope": replace(_GEMMA3, rope_scaling="linear", rope_theta=1000.0),
    "phi3-4-heads": replace(_PHI3, n_kv_heads=4),
    "phi3-8-heads-share-2-window": replace(_PHI3, n_heads=8, n_kv_heads=2, window=9),
    "phi3-three-quarters-rotated": replace(_PHI3, rotated=0.75),
    "phi3-long-rope": replace(_PHI3, **_LONGROPE),
    "phi3-short-rope": replace(_PHI3, **_LONGROPE | {"rope_original_context": 128}),
    "phi3-long-rope-three-quarters-tied": replace(_PHI3, **_LONGROPE, rotated=0.75, tied_output=True),
    "llama-yarn": replace(_LLAMA, **_YARN),
    "qwen2-yarn": replace(_QWEN2, **_YARN),
    "qwen3-yarn-attention-factor": replace(_QWEN3, **_YARN, rope_attention_factor=1.5),
}
GEMMA2_27B = replace(_GEMMA2, n_layers=46, d_model=32, d_ff=32, n_heads=4, head_dim=16)
# Every byte, a few merges, no special token; longer than the wavelengths that llama3 scaling bends.
PROMPT_IDS = tuple((7 * i * i + 3 * i + 1) % 316 for i in range(80))

READ_FROM_GGUF = {
    model.arch: name
    for name, model in reversed(CASES.items())
    if model.arch != "mixtral" and model.rope_scaling is None
}
"""A case of each family that `transformers` can read from a GGUF file."""

WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "window of gemma2": ("gemma2-4-heads-share-2", {"window": 1000}),
    "softcap of scores": ("gemma2-4-heads-share-2", {"attention_softcap": 1000.0}),
    "window of gemma3": ("gemma3-4-heads-share-2", {"window": 1000}),
    "base of layers with a window": ("gemma3-4-heads-share-2", {"rope_local_theta": 1e6}),
    "linear rope of gemma3": ("gemma3-linear-rope", {"rope_scaling": None}),
    "window of phi3": ("phi3-8-heads-share-2-window", {"window": 0}),
    "partial rotation": ("phi3-three-quarters-rotated", {"rotated": 1.0}),
    "longrope": ("phi3-long-rope", {"rope_scaling": None}),
    "longrope's long factors": ("phi3-long-rope", {"rope_original_context": 127}),
    "yarn": ("llama-yarn", {"rope_scaling": None}),
    "yarn's ramp": ("llama-yarn", {"rope_scaling": "linear"}),
    "attention factor": ("qwen3-yarn-attention-factor", {"rope_attention_factor": None}),
    "second expert": ("mixtral-2-of-8", {"n_experts_used": 1}),
    "all but three experts": ("qwen3moe-3-of-6", {"n_experts_used": 6}),
}
"""What models have beyond a Llama's parts, and the same model without it."""
