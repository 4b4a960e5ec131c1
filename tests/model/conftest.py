"""Where the vocabularies of real models are, with llama.cpp's test vectors (`ggml-vocab-NAME.gguf`, `.inp`, `.out`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """The folder of llama.cpp's vocabulary files. They are too large for the repository."""
    data = Path(os.environ.get("PRIMA_TEST_DATA") or _REPOSITORY.parent / "shared" / "data")
    folder = data / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"needs llama.cpp's vocabulary files in {folder} (PRIMA_TEST_DATA names another place)")
    return folder
