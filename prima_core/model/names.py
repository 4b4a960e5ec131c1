"""Names of tensors in a GGUF file."""

from __future__ import annotations

import re

TOKEN_EMBD = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")


def layer_tensor(layer: int, name: str) -> str:
    """`(3, "attn_q.weight")` -> `blk.3.attn_q.weight`."""
    return f"blk.{layer}.{name}"


def split_layer(full_name: str) -> tuple[int, str] | None:
    """`blk.3.attn_q.weight` -> `(3, "attn_q.weight")`; None for a tensor outside the layers."""
    match = _LAYER.fullmatch(full_name)
    return (int(match[1]), match[2]) if match else None
