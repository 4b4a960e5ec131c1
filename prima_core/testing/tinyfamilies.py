"""How families of tiny models differ: the tensors of their layers, and the keys that llama.cpp's converter writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from prima_core.testing.kquants import Float32s
from prima_core.testing.tinyspec import MatrixType, TinyModel, TinyTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


def tensors(model: TinyModel) -> Iterator[TinyTensor]:
    """All tensors of the file but those of rope factors, in file order."""
    d = model.d_model
    table, type = (model.vocab_size, d), _mixed(model, better=model.tied_output)
    # Small embeddings: a tied output would otherwise repeat the last token for ever. Gemma multiplies them by sqrt(d).
    embedding_std = (0.3 if model.is_gemma else 3) / math.sqrt(d)
    yield TinyTensor("token_embd.weight", "model.embed_tokens.weight", table, type, embedding_std)
    for layer in range(model.n_layers):
        yield from _Layer(model, layer).tensors()
    yield _gain(model, "output_norm.weight", "model.norm.weight", d, mean=10 if model.is_gemma else 1)
    if not model.tied_output:
        yield TinyTensor("output.weight", "lm_head.weight", table, _mixed(model, better=True), embedding_std)


def _gain(model: TinyModel, name: str, hf_name: str, n: int, mean: float = 1) -> TinyTensor:
    shift = 1 if model.is_gemma else 0
    return TinyTensor(name, hf_name, (n,), "F32", 0.2, mean=mean - shift, shift=shift)


class _Layer:
    """The tensors of one layer. Gains: sublayers outweigh the embedding, and attention is uneven but not so sharp that
    small errors explode."""

    def __init__(self, model: TinyModel, layer: int) -> None:
        self.model, self.layer = model, layer
        self.d_q, self.d_kv = model.n_heads * model.dim_of_head, model.n_kv_heads * model.dim_of_head
        self.plain = _mixed(model)
        self.better = _mixed(model, _uses_more_bits(layer, model.n_layers))

    def tensors(self) -> Iterator[TinyTensor]:
        yield self.gain("attn_norm", "input_layernorm")
        yield from self.fused_attention() if self.model.arch == "phi3" else self.attention()
        yield from self.norms_between() if self.model.is_gemma else [self.gain("ffn_norm", "post_attention_layernorm")]
        yield from self.feed_forward()

    def attention(self) -> Iterator[TinyTensor]:
        model, d, std = self.model, self.model.d_model, 1 / math.sqrt(self.model.d_model)
        q_heads, k_heads = (model.n_heads, model.n_kv_heads) if model.is_llama else (0, 0)
        yield self.tensor("attn_q.weight", "self_attn.q_proj.weight", (self.d_q, d), std, heads=q_heads)
        yield self.tensor("attn_k.weight", "self_attn.k_proj.weight", (self.d_kv, d), std, heads=k_heads)
        yield self.tensor("attn_v.weight", "self_attn.v_proj.weight", (self.d_kv, d), std, self.better)
        if model.arch == "qwen2":
            yield self.tensor("attn_q.bias", "self_attn.q_proj.bias", (self.d_q,), 0.5, "F32")
            yield self.tensor("attn_k.bias", "self_attn.k_proj.bias", (self.d_kv,), 0.5, "F32")
            yield self.tensor("attn_v.bias", "self_attn.v_proj.bias", (self.d_kv,), 0.5, "F32")
        if model.arch in ("qwen3", "qwen3moe", "gemma3"):
            yield self.gain("attn_q_norm", "self_attn.q_norm", model.dim_of_head)
            yield self.gain("attn_k_norm", "self_attn.k_norm", model.dim_of_head)
        yield self.attention_output()

    def fused_attention(self) -> Iterator[TinyTensor]:
        d = self.model.d_model
        shape = self.d_q + 2 * self.d_kv, d
        yield self.tensor("attn_qkv.weight", "self_attn.qkv_proj.weight", shape, 1 / math.sqrt(d))
        yield self.attention_output()

    def attention_output(self) -> TinyTensor:
        shape = self.model.d_model, self.d_q
        return self.tensor("attn_output.weight", "self_attn.o_proj.weight", shape, 1 / math.sqrt(self.d_q))

    def norms_between(self) -> Iterator[TinyTensor]:
        yield self.gain("post_attention_norm", "post_attention_layernorm")
        yield self.gain("ffn_norm", "pre_feedforward_layernorm")
        yield self.gain("post_ffw_norm", "post_feedforward_layernorm")

    def feed_forward(self) -> Iterator[TinyTensor]:
        d, d_ff, n = self.model.d_model, self.model.d_ff, self.model.n_experts
        std, std_down = 1.5 / math.sqrt(d), 1 / math.sqrt(d_ff)
        if n:
            yield self.tensor("ffn_gate_inp.weight", "mlp.gate.weight", (n, d), 2 / math.sqrt(d), "F32")
            yield self.tensor("ffn_gate_exps.weight", "mlp.experts.gate_up_proj", (n, d_ff, d), std)
            yield self.tensor("ffn_up_exps.weight", "mlp.experts.gate_up_proj", (n, d_ff, d), std)
            yield self.tensor("ffn_down_exps.weight", "mlp.experts.down_proj", (n, d, d_ff), std_down, self.better)
            return
        if self.model.arch == "phi3":
            yield self.tensor("ffn_up.weight", "mlp.gate_up_proj.weight", (2 * d_ff, d), std)
        else:
            yield self.tensor("ffn_gate.weight", "mlp.gate_proj.weight", (d_ff, d), std)
            yield self.tensor("ffn_up.weight", "mlp.up_proj.weight", (d_ff, d), std)
        yield self.tensor("ffn_down.weight", "mlp.down_proj.weight", (d, d_ff), std_down, self.better)

    def gain(self, name: str, hf_name: str, n: int = 0) -> TinyTensor:
        full_name, hf_full_name = self.names(f"{name}.weight", f"{hf_name}.weight")
        return _gain(self.model, full_name, hf_full_name, n or self.model.d_model)

    def tensor(
        self,
        name: str,
        hf_name: str,
        shape: tuple[int, ...],
        std: float,
        type: MatrixType | None = None,
        heads: int = 0,
    ) -> TinyTensor:
        return TinyTensor(*self.names(name, hf_name), shape, type or self.plain, std, n_rotated_heads=heads)

    def names(self, name: str, hf_name: str) -> tuple[str, str]:
        return f"blk.{self.layer}.{name}", f"model.layers.{self.layer}.{hf_name}"


def _mixed(model: TinyModel, better: bool = False) -> MatrixType:
    if model.types != "Q4_K_M":
        return model.types
    return "Q6_K" if better else "Q4_K"


def _uses_more_bits(layer: int, n_layers: int) -> bool:
    """`use_more_bits` of llama-quant.cpp: first and last eighth, and every third layer between."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


# ---------------------------------------------------------------- rope factors


def rope_factors(model: TinyModel) -> dict[str, Float32s]:
    """The tensors of rope factors, as the file has them."""
    if model.rope_scaling == "llama3":
        return {"rope_freqs.weight": llama3_rope_factors(model)}
    if model.rope_scaling == "longrope":
        long, short = longrope_factors(model)
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    return {}


def llama3_rope_factors(model: TinyModel) -> Float32s:
    """`rope_freqs.weight` [head_dim / 2]: what frequencies are divided by under llama3 scaling.

    Source: `LlamaModel.generate_extra_tensors` of llama.cpp's converter.
    """
    return np.array([_llama3_factor(model, i) for i in range(0, model.dim_of_head, 2)], np.float32)


def _llama3_factor(model: TinyModel, i: int) -> float:
    wavelength = 2 * math.pi * math.pow(model.rope_theta, i / model.dim_of_head)
    if wavelength < model.rope_original_context / _LLAMA3_HIGH:
        return 1.0
    if wavelength > model.rope_original_context / _LLAMA3_LOW:
        return model.rope_factor
    smooth = (model.rope_original_context / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    return 1 / ((1 - smooth) / model.rope_factor + smooth)


def longrope_factors(model: TinyModel) -> tuple[Float32s, Float32s]:
    """Factors for long and for short contexts, [rope_dim / 2] each, by rule: real ones are searched for."""
    pairs = np.arange(model.rope_dim // 2, dtype=np.float32)
    return 1 + pairs * np.float32(0.75), 1 + pairs * np.float32(0.125)


# ---------------------------------------------------------------- metadata


def add_metadata(writer: GGUFWriter, model: TinyModel) -> None:
    """The keys about the model that llama.cpp's converter writes for this family."""
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.arch != "gemma2":
        writer.add_rope_freq_base(model.rope_theta)
    if model.arch not in ("qwen2", "phi3") or model.head_dim:
        writer.add_key_length(model.dim_of_head)
        writer.add_value_length(model.dim_of_head)
    if model.is_llama:
        writer.add_vocab_size(model.vocab_size)
    if model.is_llama or model.arch == "phi3":
        writer.add_rope_dimension_count(model.rope_dim)
    _add_variant(writer, model)
    _add_rope_scaling(writer, model)


def _add_variant(writer: GGUFWriter, model: TinyModel) -> None:
    if model.n_experts:
        writer.add_expert_count(model.n_experts)
        writer.add_expert_used_count(model.n_experts_used)
    if model.arch == "qwen3moe":
        writer.add_expert_feed_forward_length(model.d_ff)
    if model.is_gemma or model.arch == "phi3":
        writer.add_sliding_window(model.window)
    if model.arch == "gemma2":
        writer.add_attn_logit_softcapping(model.attention_softcap)
        writer.add_final_logit_softcapping(model.logit_softcap)
    if model.arch == "gemma3":
        writer.add_rope_freq_base_swa(model.rope_local_theta)


def _add_rope_scaling(writer: GGUFWriter, model: TinyModel) -> None:
    import gguf

    if model.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(model.rope_original_context)
    if model.rope_scaling == "longrope":
        writer.add_rope_scaling_attn_factors(longrope_amplitude(model))
    if model.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_factor)
    if model.rope_scaling == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(model.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(model.rope_original_context)
        if model.rope_attention_factor is not None:
            writer.add_rope_scaling_yarn_attn_factor(model.rope_attention_factor)


def longrope_amplitude(model: TinyModel) -> float:
    """Source: `Phi3MiniModel.generate_extra_tensors` of llama.cpp's converter."""
    scale = model.context_length / model.rope_original_context
    return math.sqrt(1 + math.log(scale) / math.log(model.rope_original_context))
