"""Files are checked against their family: every family's own tensors are asked for, and no others taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from prima_core.arch.families import FAMILIES, open_model, read_spec
from prima_core.arch.gemma import attention_scale
from prima_core.errors import ModelError
from prima_core.model.header import Header, TensorInfo, parse_header
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind, RopeSpec
from prima_core.model.spec import ModelSpec
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

_TINY = TinyModel(n_layers=2, d_model=64, d_ff=96, vocab_size=280, context_length=64)
_MIXTURE = replace(_TINY, n_experts=4, n_experts_used=2)
MODELS = {
    "llama": _TINY,
    "mixtral": replace(_MIXTURE, arch="mixtral"),
    "qwen2": replace(_TINY, arch="qwen2"),
    "qwen3": replace(_TINY, arch="qwen3"),
    "qwen3moe": replace(_MIXTURE, arch="qwen3moe"),
    "gemma2": replace(_TINY, arch="gemma2", tied_output=True),
    "gemma3": replace(_TINY, arch="gemma3", tied_output=True),
    "phi3": replace(_TINY, arch="phi3", rope_scaling="longrope", rope_original_context=16),
}


@pytest.fixture(params=MODELS)
def header(request: pytest.FixtureRequest, tmp_path: Path) -> Header:
    path = write_tiny_model(tmp_path / "tiny.gguf", MODELS[request.param])
    return parse_header(memoryview(path.read_bytes()))


def refusal(header: Header, tensors: dict[str, TensorInfo]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_spec(header.metadata, tensors)
    return caught.value


def test_every_missing_tensor_of_a_layer_is_named(header: Header) -> None:
    names = [name for name in header.tensors if name.startswith("blk.1.")]
    assert len(names) >= 6
    for missing in names:
        rest = {name: info for name, info in header.tensors.items() if name != missing}
        assert refusal(header, rest).field == missing


def test_every_tensor_of_another_shape_is_named(header: Header) -> None:
    for name, info in header.tensors.items():
        if name != "token_embd.weight":  # its rows are the vocabulary: the tokens disagree first
            grown = replace(info, shape=(info.shape[0] + 32, *info.shape[1:]))
            assert refusal(header, {**header.tensors, name: grown}).field == name


def test_a_tensor_that_the_family_lacks_is_named(header: Header) -> None:
    for name in ("blk.0.attn_sinks.weight", "blk.2.attn_norm.weight", "blk.0.ffn_gate_up_exps.weight"):
        info = TensorInfo(name, GGUFType.F32, "F32", (64,), 0, 256)
        assert refusal(header, {**header.tensors, name: info}).field == name


def test_llama_may_have_biases_everywhere(tmp_path: Path) -> None:
    header = parse_header(memoryview(write_tiny_model(tmp_path / "tiny.gguf", _TINY).read_bytes()))
    biases = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96, "ffn_down": 64}
    names = {f"blk.0.{name}.bias": (size,) for name, size in biases.items()}
    extra = {name: TensorInfo(name, GGUFType.F32, "F32", shape, 0, 0) for name, shape in names.items()}
    assert read_spec(header.metadata, {**header.tensors, **extra}).arch == "llama"


def test_a_mixtral_with_a_tensor_for_each_expert_says_what_to_do(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", MODELS["mixtral"])
    header = parse_header(memoryview(path.read_bytes()))
    old = TensorInfo("blk.0.ffn_gate.0.weight", GGUFType.F32, "F32", (96, 64), 0, 0)
    tensors = {name: info for name, info in header.tensors.items() if "exps" not in name} | {old.name: old}
    assert "convert the model again" in refusal(header, tensors).hint


def test_qwen3moe_without_experts_is_refused_by_the_key(tmp_path: Path) -> None:
    header = parse_header(memoryview(write_tiny_model(tmp_path / "m.gguf", MODELS["qwen3moe"]).read_bytes()))
    with pytest.raises(ModelError) as caught:
        read_spec({**header.metadata, "qwen3moe.expert_count": 0}, header.tensors)
    assert caught.value.field == "qwen3moe.expert_count"


def test_an_unknown_family_is_refused_before_its_keys_are_looked_at(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported") as caught:
        open_model(tmp_path / "other.gguf")
    assert caught.value.field == "general.architecture"
    for name in FAMILIES:
        assert name in caught.value.hint


def spec_without(path: Path, arch: str, *keys: str) -> ModelSpec:
    model = replace(MODELS[arch], n_layers=7, window=9)
    header = parse_header(memoryview(write_tiny_model(path, model).read_bytes()))
    left_out = {f"{arch}.{key}" for key in keys}
    assert left_out <= header.metadata.keys()
    kept = {key: value for key, value in header.metadata.items() if key not in left_out}
    return read_spec(kept, header.tensors)


def test_a_gemma2_without_the_keys_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    keys = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"
    spec = spec_without(tmp_path / "tiny.gguf", "gemma2", *keys)
    assert spec.windows == (4096, 0, 4096, 0, 4096, 0, 4096)
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)


def test_a_gemma3_without_the_keys_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    spec = spec_without(tmp_path / "tiny.gguf", "gemma3", "rope.freq_base_swa")
    assert spec.windows == (9, 9, 9, 9, 9, 0, 9)
    assert spec.local_rope == RopeSpec(16, 10000.0)
    assert spec_without(tmp_path / "tiny.gguf", "gemma3", "attention.sliding_window").windows == ()


def test_only_llamas_rotate_neighbours() -> None:
    assert {name for name, own in FAMILIES.items() if own.rope is RopeKind.NORM} == {"llama", "mistral3"}


@pytest.mark.parametrize(("arch", "n_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemma_of_27b_is_known_by_its_layers(tmp_path: Path, arch: str, n_layers: int) -> None:
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", replace(MODELS[arch], head_dim=48))) as model:
        assert attention_scale(model.spec) == 48**-0.5
        assert attention_scale(replace(model.spec, n_layers=n_layers)) == 16**-0.5
        assert attention_scale(replace(model.spec, n_layers=n_layers, n_heads=128)) == 0.5**-0.5
