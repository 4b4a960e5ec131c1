"""The numbers of a model are read with the right defaults, and senseless ones are refused by their key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prima_core.arch.families import read_spec
from prima_core.errors import ModelError
from prima_core.model.facts import Scalar
from prima_core.model.header import Header, parse_header
from prima_core.model.rope import RopeSpec
from prima_core.model.spec import Experts, ModelSpec
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.model.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    T_F16,
    T_TQ1_0,
    U32,
    Key,
    Tensor,
    build,
    model_keys,
    model_tensors,
    with_key,
    with_tensor,
)

LLAMA = ModelSpec(
    arch="llama",
    name="small",
    n_layers=1,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=256,
    vocab_size=8,
    context_length=64,
    norm_eps=float(np.float32(1e-5)),
    rope=RopeSpec(8, 10000.0),
    tied_output=True,
)


def header(keys: list[Key], tensors: list[Tensor] | None = None) -> Header:
    return parse_header(memoryview(build(keys, tensors or []).data))


def spec_of(keys: list[Key], tensors: list[Tensor] | None = None) -> ModelSpec:
    parsed = header(keys, model_tensors() if tensors is None else tensors)
    return ModelSpec.from_metadata(parsed.metadata, parsed.tensors)


def checked(keys: list[Key], tensors: list[Tensor]) -> ModelSpec:
    parsed = header(keys, tensors)
    return read_spec(parsed.metadata, parsed.tensors)


def without(keys: list[Key], name: str) -> list[Key]:
    return [key for key in keys if key.name != name]


def refused_field(keys: list[Key], tensors: list[Tensor] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        spec_of(keys, tensors)
    return caught.value.field


def test_a_llama_model_is_read() -> None:
    assert checked(model_keys(), model_tensors()) == LLAMA


def test_a_qwen2_model_has_biases() -> None:
    assert checked(model_keys("qwen2"), model_tensors("qwen2")) == replace(LLAMA, arch="qwen2")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_written_by_the_gguf_package_is_whole(tmp_path: Path, arch: str, tied: bool) -> None:
    tiny = TinyModel(arch=arch, tied_output=tied, types="Q4_K_M")  # type: ignore[arg-type]  # one of its literals
    parsed = parse_header(memoryview(write_tiny_model(tmp_path / "m.gguf", tiny).read_bytes()))
    spec = read_spec(parsed.metadata, parsed.tensors)
    assert (spec.n_layers, spec.d_model, spec.d_ff, spec.vocab_size) == (2, 256, 512, 512)
    assert spec.tied_output is tied


def test_absent_numbers_take_their_defaults() -> None:
    keys = without(without(model_keys(), "llama.attention.head_count_kv"), "llama.rope.freq_base")
    spec = spec_of(without(keys, "general.name"))
    assert spec.n_kv_heads == 4
    assert spec.rope.theta == 10000.0
    assert spec.name == "llama"


def test_heads_may_be_wider_than_the_embedding_says() -> None:
    keys = [*model_keys(), Key("llama.attention.key_length", U32, 16), Key("llama.attention.value_length", U32, 16)]
    spec = spec_of(keys)
    assert spec.head_dim == spec.rope.dim == 16
    with pytest.raises(
        ModelError, match=r"attn_q\.weight: has the shape \[32, 32\], but the metadata ask for \[64, 32\]"
    ):
        checked(keys, model_tensors())


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ([], 1.0),
        ([Key("llama.rope.scaling.type", STRING, "linear"), Key("llama.rope.scaling.factor", F32, 4.0)], 4.0),
        ([Key("llama.rope.scaling.factor", F32, 4.0)], 4.0),
        ([Key("llama.rope.scale_linear", F32, 2.0)], 2.0),
        ([Key("llama.rope.scaling.type", STRING, "none"), Key("llama.rope.scaling.factor", F32, 4.0)], 1.0),
        ([Key("llama.rope.scaling.factor", F32, 0.0)], 1.0),
    ],
)
def test_linear_rope_scaling_is_read_as_llama_cpp_reads_it(keys: list[Key], factor: float) -> None:
    assert spec_of([*model_keys(), *keys]).rope.factor == factor


def test_the_vocabulary_is_as_large_as_the_embedding_even_when_the_metadata_disagree() -> None:
    keys = [*without(model_keys(), "tokenizer.ggml.tokens"), Key("llama.vocab_size", U32, 7)]
    assert spec_of(keys).vocab_size == 8


def test_without_weights_the_tokens_count() -> None:
    assert spec_of(model_keys(), []).vocab_size == 8


def test_a_vocabulary_that_does_not_fit_the_embedding_is_refused() -> None:
    keys = with_key(model_keys(), Key("tokenizer.ggml.tokens", ARRAY, ["a"] * 9))
    assert refused_field(keys) == "token_embd.weight"


def test_another_family_is_refused_with_those_that_work() -> None:
    with pytest.raises(ModelError, match=r"model family 'falcon' is not supported .*llama, .*qwen2") as caught:
        checked(model_keys("falcon"), [])
    assert caught.value.field == "general.architecture"


REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
EPS = "llama.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize("key", [*(f"llama.{key}" for key in REQUIRED), EPS, "general.architecture"])
def test_a_missing_number_is_named(key: str) -> None:
    assert refused_field(without(model_keys(), key)) == key


@pytest.mark.parametrize("key", [*REQUIRED, "attention.head_count_kv"])
@pytest.mark.parametrize(
    ("kind", "value"), [(U32, 0), (I32, -1), (U32, 2**32 - 1), (F32, 2.0), (BOOL, 1), (STRING, "2"), (ARRAY, [2])]
)
def test_a_count_of_no_sense_is_refused_by_its_key(key: str, kind: int, value: object) -> None:
    name = f"llama.{key}"
    assert refused_field(with_key(model_keys(), Key(name, kind, value, of=U32))) == name


@pytest.mark.parametrize("key", [EPS, "llama.rope.freq_base"])
@pytest.mark.parametrize(
    ("kind", "value"), [(F32, -1.0), (F32, float("nan")), (F32, float("inf")), (F32, 1e30), (U32, 1), (ARRAY, [1.0])]
)
def test_a_float_of_no_sense_is_refused_by_its_key(key: str, kind: int, value: object) -> None:
    assert refused_field(with_key(model_keys(), Key(key, kind, value, of=F32))) == key


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (Key("llama.attention.head_count", U32, 5), "llama.attention.head_count_kv"),
        (Key("llama.attention.head_count_kv", U32, 3), "llama.attention.head_count_kv"),
        (Key("llama.embedding_length", U32, 30), "llama.attention.head_count"),
        (Key("llama.embedding_length", U32, 12), "llama.attention.key_length"),
        (Key("llama.attention.key_length", U32, 7), "llama.attention.key_length"),
        (Key("llama.attention.value_length", U32, 16), "llama.attention.value_length"),
        (Key("llama.rope.dimension_count", U32, 10), "llama.rope.dimension_count"),
        (Key("llama.rope.dimension_count", U32, 5), "llama.rope.dimension_count"),
        (Key("llama.rope.scaling.type", STRING, "dynamic"), "llama.rope.scaling.type"),
        (Key("llama.rope.scaling.type", STRING, "longrope"), "llama.rope.scaling.type"),
        (Key("llama.rope.scaling.type", ARRAY, ["linear"]), "llama.rope.scaling.type"),
        (Key("llama.rope.scaling.factor", F32, -2.0), "llama.rope.scaling.factor"),
        (Key("llama.rope.scaling.attn_factor", F32, -0.5), "llama.rope.scaling.attn_factor"),
        (Key("llama.expert_count", U32, 8), "llama.expert_count"),
        (Key("llama.expert_count", U32, 0xFFFFFFFF), "llama.expert_count"),
        *(
            (Key(f"llama.{key}", kind, value), f"llama.{key}")
            for key, kind, value in [
                ("attention.causal", BOOL, 0),
                ("attention.scale", F32, 0.5),
                ("attention.sliding_window", U32, 1024),
                ("attention.temperature_scale", F32, 0.1),
                ("attn_logit_softcapping", F32, 50.0),
                ("expert_gating_func", U32, 2),
                ("expert_weights_scale", F32, 2.5),
                ("final_logit_softcapping", F32, 30.0),
                ("rope.dimension_sections", ARRAY, ["1"]),
                ("rope.scaling.yarn_ext_factor", F32, 0.5),
                ("use_parallel_residual", BOOL, 1),
            ]
        ),
    ],
)
def test_numbers_that_do_not_go_together_and_unknown_variants_are_refused(key: Key, field: str) -> None:
    keys = model_keys()
    if key.name == "llama.attention.value_length":
        keys.append(Key("llama.attention.key_length", U32, 8))
    assert refused_field(with_key(keys, key)) == field


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_missing_tensor_is_named(arch: str) -> None:
    tensors = model_tensors(arch)
    for missing in tensors:
        with pytest.raises(ModelError, match="is missing") as caught:
            checked(model_keys(arch), [tensor for tensor in tensors if tensor is not missing])
        assert caught.value.field == missing.name


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_tensor_of_another_shape_is_named(arch: str) -> None:
    for tensor in model_tensors(arch):
        if tensor.name == "token_embd.weight":
            continue  # its rows are the vocabulary: the tokens disagree first
        grown = replace(tensor, shape=(tensor.shape[0] + 32, *tensor.shape[1:]))
        with pytest.raises(ModelError, match="has the shape") as caught:
            checked(model_keys(arch), with_tensor(model_tensors(arch), grown))
        assert caught.value.field == tensor.name


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "blk.1.attn_norm.weight", "blk.0.ffn_gate_exps.weight", "other.weight"]
)
def test_a_tensor_of_another_kind_of_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such tensor") as caught:
        checked(model_keys(), with_tensor(model_tensors(), Tensor(name, (32,))))
    assert caught.value.field == name


def test_rope_factors_and_an_output_matrix_are_welcome() -> None:
    extra = [Tensor("rope_freqs.weight", (4,)), Tensor("output.weight", (8, 32))]
    assert checked(model_keys(), [*model_tensors(), *extra]).tied_output is False


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("rope_freqs.weight", (8,)),
        Tensor("rope_freqs.weight", (4,), T_F16),
        Tensor("output_norm.weight", (32,), T_F16),
        Tensor("blk.0.ffn_down.weight", (32, 256), T_TQ1_0),
        Tensor("blk.0.attn_q.weight", (1, 32, 32)),
    ],
)
def test_a_tensor_of_the_wrong_type_or_shape_is_named(tensor: Tensor) -> None:
    with pytest.raises(ModelError) as caught:
        checked(model_keys(), with_tensor(model_tensors(), tensor))
    assert caught.value.field == tensor.name


def test_a_name_of_the_model_is_fit_to_print() -> None:
    name = spec_of(with_key(model_keys(), Key("general.name", STRING, b"\x1b[2J\xff" + b"x" * 500))).name
    assert name.isprintable()
    assert len(name) < 100


# ---------------------------------------------------------------- what only some families have


def spec_with(defaults: dict[str, Scalar], *keys: Key, n_layers: int = 4) -> ModelSpec:
    given = with_key(model_keys(), Key("llama.block_count", U32, n_layers))
    parsed = header([*given, *keys], model_tensors())
    return ModelSpec.from_metadata(parsed.metadata, parsed.tensors, defaults)


WINDOW = "attention.sliding_window"


@pytest.mark.parametrize(
    ("defaults", "windows"),
    [
        ({WINDOW: 0}, ()),
        ({WINDOW: 9}, (9, 9, 9, 9)),
        ({WINDOW: 9, f"{WINDOW}_pattern": 2}, (9, 0, 9, 0)),
        ({WINDOW: 9, f"{WINDOW}_pattern": 3}, (9, 9, 0, 9)),
        ({WINDOW: 9, f"{WINDOW}_pattern": 1}, (0, 0, 0, 0)),
    ],
)
def test_in_a_pattern_of_n_every_nth_layer_sees_everything(
    defaults: dict[str, Scalar], windows: tuple[int, ...]
) -> None:
    spec = spec_with(defaults)
    assert spec.windows == windows
    assert [spec.window(layer) for layer in range(4)] == list(windows or (0, 0, 0, 0))


def test_the_file_counts_more_than_the_family() -> None:
    keys = Key(f"llama.{WINDOW}", U32, 5), Key(f"llama.{WINDOW}_pattern", U32, 4)
    assert spec_with({WINDOW: 9, f"{WINDOW}_pattern": 2}, *keys).windows == (5, 5, 5, 0)


def test_a_pattern_may_have_a_truth_value_for_each_layer() -> None:
    pattern = Key(f"llama.{WINDOW}_pattern", ARRAY, [1, 0, 0, 1], of=BOOL)
    assert spec_with({WINDOW: 9}, pattern).windows == (9, 0, 0, 9)


@pytest.mark.parametrize("pattern", [[1, 0, 1], [1, 0, 2, 0]])
def test_a_pattern_of_no_sense_is_refused(pattern: list[int]) -> None:
    with pytest.raises(ModelError, match="no array of 4 truth values"):
        spec_with({WINDOW: 9}, Key(f"llama.{WINDOW}_pattern", ARRAY, pattern, of=U32))


def test_layers_with_a_window_may_rotate_by_a_base_of_their_own() -> None:
    spec = spec_with({WINDOW: 9, f"{WINDOW}_pattern": 2, "rope.freq_base_swa": 500.0})
    assert [spec.layer_rope(layer).theta for layer in range(4)] == [500.0, 10000.0, 500.0, 10000.0]
    assert spec_with({WINDOW: 0, "rope.freq_base_swa": 500.0}).local_rope is None


def test_experts_are_read() -> None:
    keys = Key("llama.expert_count", U32, 8), Key("llama.expert_used_count", U32, 2)
    assert spec_with({"expert_count": 0}, *keys).experts == Experts(8, 2, d_ff=256)
    wide = Key("llama.expert_feed_forward_length", U32, 96)
    assert spec_with({"expert_count": 0}, *keys, wide).experts == Experts(8, 2, d_ff=96)
    assert spec_with({"expert_count": 0}).experts is None


@pytest.mark.parametrize("n_used", [0, 9])
def test_more_experts_than_there_are_cannot_be_used(n_used: int) -> None:
    keys = Key("llama.expert_count", U32, 8), Key("llama.expert_used_count", U32, n_used)
    with pytest.raises(ModelError) as caught:
        spec_with({"expert_count": 0}, *keys)
    assert caught.value.field == "llama.expert_used_count"


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
@pytest.mark.parametrize("value", [-1.0, 1e-300, float("nan"), float("inf"), 50])
def test_a_softcap_of_no_sense_is_refused(key: str, value: float) -> None:
    """1e-300 is 0 as float32, which would mean no cap at all."""
    with pytest.raises(ModelError) as caught:
        spec_with({key: value})
    assert caught.value.field == f"llama.{key}"
