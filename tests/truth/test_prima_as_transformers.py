"""prima's exact twin computes what `transformers` computes, for every family and from every tensor type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.testing.reference import exact_logits, greedy_ids
from prima_core.testing.tinymodel import write_tiny_model
from tests.truth.cases import CASES, GEMMA2_27B, PROMPT_IDS, READ_FROM_GGUF, WITHOUT
from tests.truth.hf import build_hf, hf_logits, read_hf, relative_error


@pytest.mark.parametrize("name", CASES)
def test_exact_twin_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    logits = exact_logits(write_tiny_model(tmp_path / "tiny.gguf", model), PROMPT_IDS)
    assert logits.shape == (len(PROMPT_IDS), model.vocab_size)
    assert relative_error(logits, hf_logits(build_hf(model), PROMPT_IDS)) < 1e-4


@pytest.mark.parametrize("name", READ_FROM_GGUF.values())
def test_exact_twin_and_transformers_read_the_same_from_one_file(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", CASES[name])
    theirs = hf_logits(read_hf(path, CASES[name]), PROMPT_IDS)
    assert relative_error(exact_logits(path, PROMPT_IDS), theirs) < 1e-4


def test_gemma_of_27b_scales_scores_by_the_width_of_the_model(tmp_path: Path) -> None:
    ids = PROMPT_IDS[:10]
    logits = exact_logits(write_tiny_model(tmp_path / "tiny.gguf", GEMMA2_27B), ids)
    assert relative_error(logits, hf_logits(build_hf(GEMMA2_27B), ids)) < 1e-4


@pytest.mark.parametrize("feature", WITHOUT)
def test_what_a_family_has_changes_its_tokens(feature: str, tmp_path: Path) -> None:
    """Otherwise agreement with others would say nothing about it."""
    name, changes = WITHOUT[feature]
    models = CASES[name], replace(CASES[name], **changes)
    paths = [write_tiny_model(tmp_path / f"{index}.gguf", model) for index, model in enumerate(models)]
    with_it, without = (greedy_ids(path, PROMPT_IDS, 8) for path in paths)
    assert with_it != without


def test_the_softcap_of_logits_shrinks_them(tmp_path: Path) -> None:
    model = CASES["gemma2-4-heads-share-2"]
    paths = [write_tiny_model(tmp_path / f"{cap}.gguf", replace(model, logit_softcap=cap)) for cap in (3.0, 1000.0)]
    capped, free = (exact_logits(path, PROMPT_IDS) for path in paths)
    assert abs(capped).max() <= 3 < abs(free).max() / 2
