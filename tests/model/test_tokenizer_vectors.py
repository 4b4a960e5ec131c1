"""llama.cpp's own vectors: 47 texts, and the ids that each real vocabulary gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.model.gguf import GGUFFile
from prima_core.model.tokenizer import Tokenizer

_SEPARATOR = "\n__ggml_vocab_test__\n"
_NAMES = ["llama-bpe", "qwen2", "gpt-2", "starcoder", "deepseek-llm", "llama-spm", "phi-3"]


def load(vocabularies: Path, name: str) -> Tokenizer:
    with GGUFFile.open(vocabularies / f"ggml-vocab-{name}.gguf") as file:
        return Tokenizer.from_metadata(file.metadata)


def vectors(vocabularies: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (vocabularies / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(_SEPARATOR)
    lines = (vocabularies / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(text, [int(id) for id in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", _NAMES)
def test_every_vector_tokenizes_exactly_and_decodes_to_its_text(vocabularies: Path, name: str) -> None:
    tokenizer = load(vocabularies, name)
    cases = vectors(vocabularies, name)
    assert len(cases) == 47
    assert [(text, tokenizer.encode(text)) for text, _ in cases] == cases
    prefix = " " if name in ("llama-spm", "phi-3") else ""  # SentencePiece puts a space before a text, also to be seen
    assert [tokenizer.decode(ids) for _, ids in cases] == [prefix + text if text else "" for text, _ in cases]


def test_llama_3_asks_for_bos_though_its_file_does_not_say_so(vocabularies: Path) -> None:
    tokenizer = load(vocabularies, "llama-bpe")
    assert tokenizer.encode("Hello", add_special=True) == [128000, *tokenizer.encode("Hello")]
    assert tokenizer.eos_ids == {128001, 128009}


def test_qwen2_ends_at_the_end_of_a_turn_and_of_a_text(vocabularies: Path) -> None:
    tokenizer = load(vocabularies, "qwen2")
    assert tokenizer.eos_ids == {151643, 151645}
    assert tokenizer.vocab_size == 151936
    assert tokenizer.encode("Hello", add_special=True) == tokenizer.encode("Hello")


def test_sentencepiece_does_not_read_special_tokens_out_of_text(vocabularies: Path) -> None:
    tokenizer = load(vocabularies, "llama-spm")
    assert tokenizer.encode("<s>hi</s>", parse_special=True)[0] == 1
    assert not {1, 2} & set(tokenizer.encode("<s>hi</s>"))
