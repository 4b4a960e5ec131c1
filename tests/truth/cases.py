"""Tiny models that between them use every branch of a family: head counts, rope, output, types."""

from __future__ import annotations

from dataclasses import replace

from prima_core.testing.tinymodel import TinyModel

_LLAMA = TinyModel(d_model=128, d_ff=192, vocab_size=320, context_length=128, seed=31)
_QWEN2 = replace(_LLAMA, arch="qwen2", norm_eps=1e-6, rope_theta=1e6, seed=32)
_LONG_ROWS = TinyModel(vocab_size=320, seed=33)  # K types need rows of a multiple of 256

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
}
# Every byte, a few merges, no special token; longer than the wavelengths that llama3 scaling bends.
PROMPT_IDS = tuple((7 * i * i + 3 * i + 1) % 316 for i in range(80))
