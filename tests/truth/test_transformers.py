"""The yardstick itself: our GGUF files mean the same to `transformers` as the weights they were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.testing.tinymodel import write_tiny_model
from tests.truth.cases import CASES, PROMPT_IDS, READ_FROM_GGUF
from tests.truth.hf import build_hf, hf_logits, read_hf, relative_error

LLAMA_AND_QWEN2 = {name for name, model in CASES.items() if model.arch in ("llama", "qwen2")}


@pytest.mark.parametrize("name", sorted(LLAMA_AND_QWEN2 | set(READ_FROM_GGUF.values())))
def test_gguf_read_by_transformers_gives_the_logits_of_the_weights(name: str, tmp_path: Path) -> None:
    model = CASES[name]
    from_file = read_hf(write_tiny_model(tmp_path / "tiny.gguf", model), model)
    from_weights = build_hf(model)
    assert relative_error(hf_logits(from_file, PROMPT_IDS), hf_logits(from_weights, PROMPT_IDS)) < 1e-6


@pytest.mark.parametrize("name", ["llama-llama3-rope", "llama-linear-rope", "qwen2-linear-rope"])
def test_rope_scaling_changes_the_logits_of_these_models_enough_to_be_seen(name: str) -> None:
    scaled = hf_logits(build_hf(CASES[name]), PROMPT_IDS)
    unscaled = hf_logits(build_hf(replace(CASES[name], rope_scaling=None)), PROMPT_IDS)
    assert relative_error(unscaled, scaled) > 0.1
