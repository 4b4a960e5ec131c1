"""Phi-3 (Abdin et al. 2024), Phi-3.5 and Phi-4: a Llama whose maps are fused, q with k with v and gate with up.

The long-context ones have LongRoPE, Phi-4-mini rotates three quarters of each head. A sliding window holds in all
layers, as in `transformers`; llama.cpp computes without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType

from prima_core.arch.family import Family, Shapes
from prima_core.arch.llama import LlamaBlock
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.parts import norms
from prima_core.arch.slots import Binder
from prima_core.interfaces import Weight
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec


class Phi3Block(LlamaBlock[A, W, K]):
    def __init__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, layer: int, weights: Mapping[str, Weight]
    ) -> None:
        super().__init__(ops, binder, model, layer, {**weights, **_unfused(model, weights)})


def _unfused(model: ModelSpec, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Views of the rows of fused maps, by the names of Llama's."""
    d_q, d_kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    names = ("attn_q.weight", "attn_k.weight", "attn_v.weight"), ("ffn_gate.weight", "ffn_up.weight")
    qkv = _parts(weights["attn_qkv.weight"], (d_q, d_kv, d_kv))
    gate_up = _parts(weights["ffn_up.weight"], (model.d_ff, model.d_ff))
    return dict(zip(names[0], qkv, strict=True)) | dict(zip(names[1], gate_up, strict=True))


def _parts(weight: Weight, sizes: tuple[int, ...]) -> list[Weight]:
    return [weight.part(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _shapes(model: ModelSpec) -> Shapes:
    d, d_q, d_kv = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    return norms(model, "attn_norm", "ffn_norm") | {
        "attn_qkv.weight": (d_q + 2 * d_kv, d),
        "attn_output.weight": (d, d_q),
        "ffn_up.weight": (2 * model.d_ff, d),
        "ffn_down.weight": (d, model.d_ff),
    }


PHI3 = Family("phi3", RopeKind.NEOX, _shapes, Phi3Block, defaults=MappingProxyType({"attention.sliding_window": 0}))
