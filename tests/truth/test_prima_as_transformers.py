"""prima's exact twin computes what `transformers` computes, for every family and from every tensor type."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.testing.reference import exact_logits
from prima_core.testing.tinymodel import write_tiny_model
from tests.truth.cases import CASES, PROMPT_IDS
from tests.truth.hf import build_hf, hf_logits, read_hf, relative_error


@pytest.mark.parametrize("name", CASES)
def test_exact_twin_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    logits = exact_logits(write_tiny_model(tmp_path / "tiny.gguf", model), PROMPT_IDS)
    assert logits.shape == (len(PROMPT_IDS), model.vocab_size)
    assert relative_error(logits, hf_logits(build_hf(model), PROMPT_IDS)) < 1e-4


@pytest.mark.parametrize("name", ["llama-8-heads-share-2", "qwen2-8-heads-share-2"])
def test_exact_twin_and_transformers_read_the_same_from_one_file(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", CASES[name])
    theirs = hf_logits(read_hf(path, CASES[name]), PROMPT_IDS)
    assert relative_error(exact_logits(path, PROMPT_IDS), theirs) < 1e-4
