from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prima_core.errors import ConfigError
from prima_core.model.quant import GGUFType
from prima_core.testing.kquants import Bytes, Float32s, quantize_q4_k, quantize_q6_k
from prima_core.testing.randomblocks import RANDOM_TYPES, random_blocks
from prima_core.testing.tinymodel import (
    LLAMA_1B_SHAPE,
    Arch,
    MatrixType,
    TinyModel,
    big_shape,
    tensors,
    write_tiny_model,
)
from prima_core.testing.tinyvocab import tiny_vocab

SMALL = TinyModel(d_model=64, d_ff=96, vocab_size=280, context_length=64)


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    one, two = (write_tiny_model(tmp_path / name, SMALL).read_bytes() for name in ("one", "two"))
    assert one == two


def test_seed_changes_every_matrix_and_nothing_of_the_header(tmp_path: Path) -> None:
    one, two = (gguf.GGUFReader(write_tiny_model(tmp_path / str(seed), replace(SMALL, seed=seed))) for seed in (1, 2))
    assert [tensor.name for tensor in one.tensors] == [tensor.name for tensor in two.tensors]
    assert not any(np.array_equal(a.data, b.data) for a, b in zip(one.tensors, two.tensors, strict=True))


def test_weights_of_a_layer_do_not_depend_on_other_layers(tmp_path: Path) -> None:
    short, long = (gguf.GGUFReader(write_tiny_model(tmp_path / str(n), replace(SMALL, n_layers=n))) for n in (1, 3))
    assert short.get_tensor(1).name == "blk.0.attn_norm.weight"
    assert np.array_equal(short.get_tensor(1).data, long.get_tensor(1).data)


@pytest.mark.parametrize(
    ("quantize", "type", "tolerance"), [(quantize_q4_k, "Q4_K", 0.09), (quantize_q6_k, "Q6_K", 0.025)]
)
def test_k_quantisers_come_close_to_the_weights(
    quantize: Callable[[Float32s], Bytes], type: str, tolerance: float
) -> None:
    weights = np.random.default_rng(0).normal(0.01, 0.02, (16, 512)).astype(np.float32)
    weights[3, :256] = 0
    weights[4, 256:] = 0.5
    stored = gguf.dequantize(quantize(weights), gguf.GGMLQuantizationType[type])
    assert np.linalg.norm(stored - weights) < tolerance * np.linalg.norm(weights - weights.mean())
    assert not stored[3, :256].any()


@pytest.mark.parametrize("type", sorted(RANDOM_TYPES))
def test_random_blocks_are_as_widely_spread_as_the_weights_about_zero(type: GGUFType) -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (64, 1024)).astype(np.float32)
    blocks = random_blocks(weights, type)
    stored = gguf.dequantize(blocks, gguf.GGMLQuantizationType(type))
    assert stored.shape == weights.shape
    assert stored.std() == pytest.approx(0.02, rel=0.05)
    assert abs(stored.mean()) < (0.1 if type is GGUFType.IQ4_NL else 0.02) * 0.02  # IQ4_NL's levels are not even
    np.testing.assert_array_equal(random_blocks(weights, type), blocks)
    assert not np.array_equal(random_blocks(weights * 2, type)[:, 8:16], blocks[:, 8:16])


@pytest.mark.parametrize("type", get_args(MatrixType))
def test_a_model_of_any_type_holds_its_matrices_in_that_type(tmp_path: Path, type: MatrixType) -> None:
    model = TinyModel(n_layers=1, d_ff=256, vocab_size=280, context_length=64, types=type)
    stored = {t.name: t for t in gguf.GGUFReader(write_tiny_model(tmp_path / "tiny.gguf", model)).tensors}
    for tensor in tensors(model):
        values = gguf.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        assert stored[tensor.name].tensor_type.name == tensor.type
        assert values.std() == pytest.approx(tensor.std, rel=0.2)


def test_rows_that_do_not_fill_k_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="256"):
        write_tiny_model(tmp_path / "tiny.gguf", replace(SMALL, types="Q4_K"))


def test_heads_that_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 heads"):
        TinyModel(n_heads=4, n_kv_heads=3)


def test_llama3_scaling_is_refused_for_qwen2() -> None:
    with pytest.raises(ConfigError, match="llama3"):
        TinyModel(arch="qwen2", rope_scaling="llama3")


def test_q4_k_m_gives_more_bits_where_llamacpp_does() -> None:
    better = [tensor.name for tensor in tensors(LLAMA_1B_SHAPE) if tensor.type == "Q6_K"]
    layers = (0, 1, 4, 7, 10, 13, 14, 15)
    assert better == ["token_embd.weight"] + [f"blk.{i}.{n}.weight" for i in layers for n in ("attn_v", "ffn_down")]


def test_big_shape_writes_the_planned_tensors_with_the_planned_spread(tmp_path: Path) -> None:
    model = replace(LLAMA_1B_SHAPE, n_layers=2, d_model=256, d_ff=512, n_heads=4, n_kv_heads=2, vocab_size=2000)
    stored = {t.name: t for t in gguf.GGUFReader(big_shape(tmp_path / "big.gguf", model)).tensors}
    assert list(stored) == ["rope_freqs.weight", *(tensor.name for tensor in tensors(model))]
    for tensor in tensors(model):
        values = gguf.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        assert values.shape == tensor.shape
        assert stored[tensor.name].tensor_type.name == tensor.type
        assert values.std() == pytest.approx(tensor.std, rel=0.2)


@pytest.mark.parametrize(("arch", "size"), [("llama", 260), ("llama", 512), ("qwen2", 3000)])
def test_vocabulary_writes_any_text_and_every_merge_has_its_parts(arch: Arch, size: int) -> None:
    vocab = TinyModel(arch=arch, vocab_size=size).vocabulary
    assert len(set(vocab.tokens)) == size
    ids = {token: i for i, token in enumerate(vocab.tokens[: -vocab.n_specials])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in vocab.merges)]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "hello world, grün 🚀\n\0"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_known_words_are_single_tokens() -> None:
    assert {"hello", "Ġworld", "Ã¼", "<|im_end|>"} <= set(tiny_vocab("llama", 512).tokens)


@pytest.mark.parametrize("size", [259, 10**6])
def test_vocabulary_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        tiny_vocab("llama", size)
