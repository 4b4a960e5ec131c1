"""Names of tensors in a GGUF file, and which tensors, of which shapes, a family has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prima_core.model.spec import ModelSpec

TOKEN_EMBD = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FREQS = "rope_freqs.weight"

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")

Shapes = dict[str, tuple[int, ...]]


def layer_tensor(layer: int, name: str) -> str:
    """`(3, "attn_q.weight")` -> `blk.3.attn_q.weight`."""
    return f"blk.{layer}.{name}"


def split_layer(full_name: str) -> tuple[int, str] | None:
    """`blk.3.attn_q.weight` -> `(3, "attn_q.weight")`; None for a tensor outside the layers."""
    match = _LAYER.fullmatch(full_name)
    return (int(match[1]), match[2]) if match else None


def shared_shapes(spec: ModelSpec) -> Shapes:
    """The tensors outside the layers, without `rope_freqs.weight`, which may be absent. Shapes in numpy order."""
    shapes: Shapes = {TOKEN_EMBD: (spec.vocab_size, spec.d_model), OUTPUT_NORM: (spec.d_model,)}
    return shapes if spec.tied_output else shapes | {OUTPUT: (spec.vocab_size, spec.d_model)}


def layer_shapes(spec: ModelSpec) -> Shapes:
    """The tensors of every layer, without the `blk.N.` prefix. Shapes in numpy order."""
    d, d_ff = spec.d_model, spec.d_ff
    d_q, d_kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: Shapes = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (d_q, d),
        "attn_k.weight": (d_kv, d),
        "attn_v.weight": (d_kv, d),
        "attn_output.weight": (d, d_q),
        "ffn_norm.weight": (d,),
        "ffn_gate.weight": (d_ff, d),
        "ffn_up.weight": (d_ff, d),
        "ffn_down.weight": (d, d_ff),
    }
    if spec.arch == "qwen2":
        shapes |= {"attn_q.bias": (d_q,), "attn_k.bias": (d_kv,), "attn_v.bias": (d_kv,)}
    return shapes
