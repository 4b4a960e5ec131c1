"""prima continues prompts as llama.cpp does, on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.testing.reference import greedy_ids
from prima_core.testing.tinymodel import write_tiny_model
from tests.truth import golden


@pytest.mark.parametrize("name", golden.greedy_names())
def test_exact_twin_continues_as_llamacpp_did(name: str, tmp_path: Path) -> None:
    fixture = golden.load_greedy(name)
    path = write_tiny_model(tmp_path / "tiny.gguf", fixture.model)
    ids = greedy_ids(path, fixture.prompt_ids, len(fixture.greedy_ids), twin="exact")
    assert tuple(ids) == fixture.greedy_ids
