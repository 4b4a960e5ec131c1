"""Random models in GGUF, the same bytes for the same `TinyModel` on every machine: for tests and benchmarks.

    path = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(arch="qwen2", types="Q4_K", seed=7))

Needs the `gguf` package (extra `testing`): a writer that is not ours, so that our reader is tested against it.
Weights come from the raw stream of PCG64 by integer sums, not from numpy's distributions, whose streams may
change with numpy and whose tails depend on the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from prima_core.model.quant import GGUFType
from prima_core.testing.kquants import Bytes, Float32s, quantize_q4_k, quantize_q6_k
from prima_core.testing.randomblocks import RANDOM_TYPES, random_blocks
from prima_core.testing.tinyfamilies import add_metadata, llama3_rope_factors, rope_factors, tensors
from prima_core.testing.tinyspec import Arch, MatrixType, TinyModel, TinyTensor, Types

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = [
    "LLAMA_1B_SHAPE",
    "Arch",
    "MatrixType",
    "TinyModel",
    "Types",
    "big_shape",
    "hf_weights",
    "llama3_rope_factors",
    "tensors",
    "write_tiny_model",
]

# llama.cpp's number for "mostly this type" (enum llama_ftype); informative only.
_FILE_TYPES: dict[Types, int] = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q6_K": 18, "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20,
    "IQ2_S": 28, "IQ3_XXS": 23, "IQ3_S": 26, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38,
}  # fmt: skip

# The shape of Llama-3.2-1B in llama.cpp's Q4_K_M: 0.81 GB.
LLAMA_1B_SHAPE = TinyModel(
    n_layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, vocab_size=128256, context_length=131072,
    tied_output=True, rope_theta=500000.0, rope_scaling="llama3", rope_factor=32.0, rope_original_context=8192,
    types="Q4_K_M",
)  # fmt: skip


def write_tiny_model(path: Path, model: TinyModel) -> Path:
    """Write `model` with random weights and a complete tokenizer to `path` (GGUF v3), and give `path` back.

    Greedy decoding is well defined: logits are spread over several units and depend on the whole context.
    """
    return _write(path, model, lambda tensor: _stored(model, tensor), lambda n_bytes: None)


def big_shape(
    path: Path, model: TinyModel = LLAMA_1B_SHAPE, wrote: Callable[[int], None] = lambda n_bytes: None
) -> Path:
    """Write `model` fast, for benchmarks: blocks are drawn from a small pool of quantised ones.

    One tensor at a time is in memory; the default takes 0.81 GB on disk, a few seconds and 0.5 GB of memory. `wrote` is
    told the bytes of each tensor that has been written.
    """
    pools: dict[tuple[MatrixType, int, float], Bytes] = {}

    def data(tensor: TinyTensor) -> Bytes:
        if len(tensor.shape) == 1:
            return _stored(model, tensor)
        n_rows, n_columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        key = (tensor.type, n_columns, tensor.std)
        if key not in pools:
            pools[key] = _encode(_random((512, n_columns), tensor.std, tensor.mean, model.seed, "pool"), tensor.type)
        return _draw_rows(pools[key], n_rows, model.seed, tensor.name)

    return _write(path, model, data, wrote)


def hf_weights(model: TinyModel) -> dict[str, Float32s]:
    """The weights that the file holds, by their names in `transformers`: dequantised to f32, heads in its row order."""
    joined: dict[str, list[Float32s]] = {}
    for tensor in tensors(model):
        values = _decode(_encode(_values(model, tensor), tensor.type), tensor.type).reshape(tensor.shape)
        joined.setdefault(tensor.hf_name, []).append(values)
    return {name: parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2) for name, parts in joined.items()}


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
    encoded = _encode(_values(model, tensor) + np.float32(tensor.shift), tensor.type)
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


def _write(path: Path, model: TinyModel, data: Callable[[TinyTensor], Bytes], wrote: Callable[[int], None]) -> Path:
    import gguf

    with closing(gguf.GGUFWriter(path, model.gguf_arch)) as writer:
        _add_metadata(writer, model)
        model.vocabulary.add_to(writer)
        planned, factors = list(tensors(model)), rope_factors(model)
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in planned:
            _add_tensor_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for tensor in planned:
            stored = data(tensor)
            writer.write_tensor_data(stored)
            wrote(stored.nbytes)
    return path


def _add_tensor_info(writer: GGUFWriter, tensor: TinyTensor) -> None:
    import gguf

    type = gguf.GGMLQuantizationType[tensor.type]
    byte_shape = gguf.quant_shape_to_byte_shape(tensor.shape, type)
    writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), type)


def _add_metadata(writer: GGUFWriter, model: TinyModel) -> None:
    """The keys that llama.cpp's converter writes."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    # llama.cpp would ask a model called phi3 for tokens that only the real vocabulary has.
    writer.add_name(f"tiny {model.arch.replace('phi3', 'phi 3')} {model.types}")
    writer.add_file_type(_FILE_TYPES[model.types])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, model)
