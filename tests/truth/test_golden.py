"""The fixtures made with llama.cpp still fit the models that `tinymodel` makes, and `transformers` agrees with them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from prima_core.arch.families import FAMILIES
from prima_core.testing.tinymodel import Arch, llama3_rope_factors, write_tiny_model
from prima_core.testing.tinyspec import RopeScaling
from tests.truth import golden
from tests.truth.hf import build_hf, hf_logits


def test_fixtures_cover_all_families_and_the_common_kinds_of_weight() -> None:
    models = [golden.load_greedy(name).model for name in golden.greedy_names()]
    assert {model.arch for model in models} == set(get_args(Arch))
    assert {model.gguf_arch for model in models} == set(FAMILIES)
    assert {model.rope_scaling for model in models} == {None, *get_args(RopeScaling)}
    assert {model.types for model in models} == {"F32", "F16", "Q8_0", "Q4_K", "Q6_K", "Q4_K_M"}
    converted = {golden.load_converted(name).model.arch for name in golden.converted_names()}
    assert converted == set(get_args(Arch)) - {"mistral3"}  # which the converter writes for models with images only


@pytest.mark.parametrize("name", golden.greedy_names())
def test_tiny_model_is_still_the_one_that_llamacpp_was_given(name: str, tmp_path: Path) -> None:
    fixture = golden.load_greedy(name)
    assert golden.tensors_sha256(write_tiny_model(tmp_path / "tiny.gguf", fixture.model)) == fixture.tensors_sha256


@pytest.mark.parametrize("name", golden.greedy_names())
def test_transformers_continues_as_llamacpp_did(name: str) -> None:
    fixture = golden.load_greedy(name)
    logits = hf_logits(build_hf(fixture.model), fixture.prompt_ids + fixture.greedy_ids[:-1])
    chosen = logits[len(fixture.prompt_ids) - 1 :].argmax(axis=1)
    assert tuple(chosen.tolist()) == fixture.greedy_ids


@pytest.mark.parametrize("name", golden.converted_names())
def test_our_file_has_the_tensors_and_keys_that_the_converter_writes(name: str, tmp_path: Path) -> None:
    fixture = golden.load_converted(name)
    path = write_tiny_model(tmp_path / "tiny.gguf", fixture.model)
    digests = golden.tensor_digests(path)
    digests.pop("rope_freqs.weight", None)  # computed, not copied: compared below
    assert digests == fixture.tensors
    assert golden.metadata(path) == fixture.metadata


def test_our_rope_factors_are_the_converters() -> None:
    fixture = golden.load_converted("converted-llama")
    # The converter takes its powers in float32: the last digit may differ with the C library.
    np.testing.assert_allclose(llama3_rope_factors(fixture.model), fixture.rope_freqs, rtol=1e-6)
    assert any(1 < factor < fixture.model.rope_factor for factor in fixture.rope_freqs)
