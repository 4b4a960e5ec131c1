"""Random models in GGUF, the same bytes for the same `TinyModel` on every machine: for tests and benchmarks.

    path = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(arch="qwen2", types="Q4_K", seed=7))

Needs the `gguf` package (extra `testing`): a writer that is not ours, so that our reader is tested against it.
Weights come from the raw stream of PCG64 by integer sums, not from numpy's distributions, whose streams may
change with numpy and whose tails depend on the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ConfigError
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.kquants import Bytes, Float32s, quantize_q4_k, quantize_q6_k
from prima_core.testing.randomblocks import RANDOM_TYPES, random_blocks
from prima_core.testing.tinyvocab import tiny_vocab

if TYPE_CHECKING:
    from gguf import GGUFWriter

Arch = Literal["llama", "qwen2"]
MatrixType = Literal[
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip
Types = Literal[MatrixType, "Q4_K_M"]
RopeScaling = Literal["linear", "llama3"]

# llama.cpp's number for "mostly this type" (enum llama_ftype); informative only.
_FILE_TYPES: dict[Types, int] = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q6_K": 18, "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20,
    "IQ2_S": 28, "IQ3_XXS": 23, "IQ3_S": 26, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38,
}  # fmt: skip
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What to make. Equal values make equal files.

    `types` is the type of every matrix; norms and biases are F32. "Q4_K_M" is llama.cpp's mix: Q4_K, but Q6_K for
    the output and for attn_v and ffn_down of some layers. K and IQ types need rows of a multiple of 256 weights,
    the others that are quantised of 32. Where there is nothing that quantises to a type, codes are random too.
    `rope_scaling="llama3"` is told to a reader by `rope_freqs.weight` alone, as llama.cpp's converter does it.
    """

    arch: Arch = "llama"
    n_layers: int = 2
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None
    d_ff: int = 512
    vocab_size: int = 512
    context_length: int = 512
    norm_eps: float = 1e-5
    tied_output: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_factor: float = 4.0
    rope_original_context: int = 64
    types: Types = "F32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads or self.dim_of_head % 2:
            raise ConfigError(
                f"{self.n_heads} heads of {self.dim_of_head} cannot share {self.n_kv_heads} key/value heads",
                hint="n_heads must be a multiple of n_kv_heads, and head_dim even",
            )
        row = BLOCKS[GGUFType["Q4_K" if self.types == "Q4_K_M" else self.types]].n_weights
        if self.d_model % row or self.d_ff % row or self.n_heads * self.dim_of_head % row:
            raise ConfigError(
                f"rows of {self.d_model}, {self.d_ff} and {self.n_heads * self.dim_of_head} weights do not all fit "
                f"{self.types}",
                hint=f"d_model, d_ff and n_heads * head_dim must be multiples of {row}",
            )
        if self.rope_scaling == "llama3" and self.arch != "llama":
            raise ConfigError(
                f"llama3 rope scaling does not exist for {self.arch!r}", hint='use arch="llama" or "linear"'
            )

    @property
    def dim_of_head(self) -> int:
        """head_dim, or d_model / n_heads where it is not given."""
        return self.head_dim or self.d_model // self.n_heads


# The shape of Llama-3.2-1B in llama.cpp's Q4_K_M: 0.81 GB.
LLAMA_1B_SHAPE = TinyModel(
    n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, vocab_size=128256, context_length=131072,
    tied_output=True, rope_theta=500000.0, rope_scaling="llama3", rope_factor=32.0, rope_original_context=8192,
    types="Q4_K_M",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TinyTensor:
    """One tensor to be: its names here and in `transformers`, and where its random values lie.

    `n_rotated_heads` > 0: rows of that many heads stand in the file in the order of adjacent rotation pairs.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    type: MatrixType
    std: float
    mean: float = 0.0
    n_rotated_heads: int = 0


def write_tiny_model(path: Path, model: TinyModel) -> Path:
    """Write `model` with random weights and a complete tokenizer to `path` (GGUF v3), and give `path` back.

    Greedy decoding is well defined: logits are spread over several units and depend on the whole context.
    """
    return _write(path, model, lambda tensor: _stored(model, tensor))


def big_shape(path: Path, model: TinyModel = LLAMA_1B_SHAPE) -> Path:
    """Write `model` fast, for benchmarks: blocks are drawn from a small pool of quantised ones.

    One tensor at a time is in memory; the default takes 0.81 GB on disk, a few seconds and 0.5 GB of memory.
    """
    pools: dict[tuple[MatrixType, int, float], Bytes] = {}

    def data(tensor: TinyTensor) -> Bytes:
        if len(tensor.shape) == 1:
            return _stored(model, tensor)
        n_rows, n_columns = tensor.shape
        key = (tensor.type, n_columns, tensor.std)
        if key not in pools:
            pools[key] = _encode(_random((512, n_columns), tensor.std, tensor.mean, model.seed, "pool"), tensor.type)
        return _draw_rows(pools[key], n_rows, model.seed, tensor.name)

    return _write(path, model, data)


def hf_weights(model: TinyModel) -> dict[str, Float32s]:
    """The weights that the file holds, by their names in `transformers`: dequantised to f32, heads in its row order."""
    return {
        tensor.hf_name: _decode(_encode(_values(model, tensor), tensor.type), tensor.type).reshape(tensor.shape)
        for tensor in tensors(model)
    }


def tensors(model: TinyModel) -> Iterator[TinyTensor]:
    """All tensors of the file but `rope_freqs.weight`, in file order."""
    d = model.d_model
    # Small embeddings: a tied output would otherwise repeat the last token for ever.
    embedding_std = 3 / math.sqrt(d)
    table, type = (model.vocab_size, d), _mixed(model, better=model.tied_output)
    yield TinyTensor("token_embd.weight", "model.embed_tokens.weight", table, type, embedding_std)
    for layer in range(model.n_layers):
        yield from _layer_tensors(model, layer)
    yield TinyTensor("output_norm.weight", "model.norm.weight", (d,), "F32", 0.2, mean=1)
    if not model.tied_output:
        yield TinyTensor("output.weight", "lm_head.weight", table, _mixed(model, better=True), embedding_std)


def _layer_tensors(model: TinyModel, layer: int) -> Iterator[TinyTensor]:
    d, d_ff = model.d_model, model.d_ff
    d_q, d_kv = model.n_heads * model.dim_of_head, model.n_kv_heads * model.dim_of_head
    plain, better = _mixed(model), _mixed(model, _uses_more_bits(layer, model.n_layers))

    def tensor(
        name: str, hf_name: str, shape: tuple[int, ...], type: MatrixType, std: float, mean: float = 0, heads: int = 0
    ) -> TinyTensor:
        return TinyTensor(f"blk.{layer}.{name}", f"model.layers.{layer}.{hf_name}", shape, type, std, mean, heads)

    # Gains: sublayers outweigh the embedding, and attention is uneven but not so sharp that small errors explode.
    yield tensor("attn_norm.weight", "input_layernorm.weight", (d,), "F32", 0.2, mean=1)
    q_heads, k_heads = (model.n_heads, model.n_kv_heads) if model.arch == "llama" else (0, 0)
    yield tensor("attn_q.weight", "self_attn.q_proj.weight", (d_q, d), plain, 1 / math.sqrt(d), heads=q_heads)
    yield tensor("attn_k.weight", "self_attn.k_proj.weight", (d_kv, d), plain, 1 / math.sqrt(d), heads=k_heads)
    yield tensor("attn_v.weight", "self_attn.v_proj.weight", (d_kv, d), better, 1 / math.sqrt(d))
    if model.arch == "qwen2":
        yield tensor("attn_q.bias", "self_attn.q_proj.bias", (d_q,), "F32", 0.5)
        yield tensor("attn_k.bias", "self_attn.k_proj.bias", (d_kv,), "F32", 0.5)
        yield tensor("attn_v.bias", "self_attn.v_proj.bias", (d_kv,), "F32", 0.5)
    yield tensor("attn_output.weight", "self_attn.o_proj.weight", (d, d_q), plain, 1 / math.sqrt(d_q))
    yield tensor("ffn_norm.weight", "post_attention_layernorm.weight", (d,), "F32", 0.2, mean=1)
    yield tensor("ffn_gate.weight", "mlp.gate_proj.weight", (d_ff, d), plain, 1.5 / math.sqrt(d))
    yield tensor("ffn_up.weight", "mlp.up_proj.weight", (d_ff, d), plain, 1.5 / math.sqrt(d))
    yield tensor("ffn_down.weight", "mlp.down_proj.weight", (d, d_ff), better, 1 / math.sqrt(d_ff))


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


def _mixed(model: TinyModel, better: bool = False) -> MatrixType:
    if model.types != "Q4_K_M":
        return model.types
    return "Q6_K" if better else "Q4_K"


def _uses_more_bits(layer: int, n_layers: int) -> bool:
    """`use_more_bits` of llama-quant.cpp: first and last eighth, and every third layer between."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def _values(model: TinyModel, tensor: TinyTensor) -> Float32s:
    return _random(tensor.shape, tensor.std, tensor.mean, model.seed, tensor.name)


def _random(shape: tuple[int, ...], std: float, mean: float, seed: int, name: str) -> Float32s:
    """Nearly normal f32: each value is the sum of the four 16-bit parts of one raw draw."""
    sums = _raw(math.prod(shape), seed, name).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int32) - 2 * 0xFFFF
    unit = np.float32(std / (2**16 / math.sqrt(3)))
    values: Float32s = sums.astype(np.float32) * unit + np.float32(mean)
    return values.reshape(shape)


def _draw_rows(pool: Bytes, n_rows: int, seed: int, name: str) -> Bytes:
    rows: Bytes = pool[_raw(n_rows, seed, name) % np.uint64(len(pool))]
    return rows


def _raw(n: int, seed: int, name: str) -> NDArray[np.uint64]:
    """A stream of its own for each name: no tensor's values depend on which others there are."""
    stream = np.random.PCG64(np.random.SeedSequence([seed, crc32(name.encode())]))
    return np.asarray(stream.random_raw(n), np.uint64)


def _stored(model: TinyModel, tensor: TinyTensor) -> Bytes:
    """The tensor's bytes [rows, bytes of a row] (or [bytes] of a vector) as they stand in the file."""
    encoded = _encode(_values(model, tensor), tensor.type)
    return _interleave_halves(encoded, tensor.n_rotated_heads) if tensor.n_rotated_heads else encoded


def _interleave_halves(rows: Bytes, n_heads: int) -> Bytes:
    """In each head, row i and row i + head_dim / 2 become neighbours. Whole rows move, so blocks stay intact."""
    halves = rows.reshape(n_heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _encode(values: Float32s, type: MatrixType) -> Bytes:
    import gguf

    if type == "Q4_K":
        return quantize_q4_k(values)
    if type == "Q6_K":
        return quantize_q6_k(values)
    if GGUFType[type] in RANDOM_TYPES:
        return random_blocks(values, GGUFType[type])
    return gguf.quantize(values, gguf.GGMLQuantizationType[type]).view(np.uint8)


def _decode(data: Bytes, type: MatrixType) -> Float32s:
    import gguf

    return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[type]), np.float32)


def _write(path: Path, model: TinyModel, data: Callable[[TinyTensor], Bytes]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, model.arch)
    _add_metadata(writer, model)
    tiny_vocab(model.arch, model.vocab_size).add_to(writer)
    planned = list(tensors(model))
    rope_factors = llama3_rope_factors(model) if model.rope_scaling == "llama3" else None
    if rope_factors is not None:
        writer.add_tensor_info("rope_freqs.weight", rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)
    for tensor in planned:
        _add_tensor_info(writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    for tensor in planned:
        writer.write_tensor_data(data(tensor))
    writer.close()
    return path


def _add_tensor_info(writer: GGUFWriter, tensor: TinyTensor) -> None:
    import gguf

    type = gguf.GGMLQuantizationType[tensor.type]
    byte_shape = gguf.quant_shape_to_byte_shape(tensor.shape, type)
    writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), type)


def _add_metadata(writer: GGUFWriter, model: TinyModel) -> None:
    """The keys that llama.cpp's converter writes for this family."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"tiny {model.arch} {model.types}")
    writer.add_file_type(_FILE_TYPES[model.types])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if model.arch == "llama" or model.head_dim:
        writer.add_key_length(model.dim_of_head)
        writer.add_value_length(model.dim_of_head)
    if model.arch == "llama":
        writer.add_vocab_size(model.vocab_size)
        writer.add_rope_dimension_count(model.dim_of_head)
    if model.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_factor)
