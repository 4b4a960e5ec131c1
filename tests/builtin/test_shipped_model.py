"""The file that ships: small, plain, splittable, and loadable by what reads GGUF."""

from __future__ import annotations

import gguf
import jinja2
import pytest

from training.export import read_gguf
from training.train import GGUF_FILE
from training.vocabulary import SPECIAL

CARD_FILE = GGUF_FILE.with_name("CARD.md")


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(GGUF_FILE)


def fact(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def test_it_has_at_most_twelve_megabytes() -> None:
    assert GGUF_FILE.stat().st_size <= 12_000_000


def test_a_ring_can_split_it_and_rows_are_whole_super_blocks(reader: gguf.GGUFReader) -> None:
    n_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)

    assert fact(reader, "general.architecture") == "llama"
    assert int(str(fact(reader, "llama.block_count"))) >= 8
    assert int(str(fact(reader, "llama.context_length"))) >= 1024
    assert 5e6 <= n_parameters <= 8e6
    assert all(int(tensor.shape[0]) % 256 == 0 for tensor in reader.tensors)


def test_matrices_are_q8_0_and_norms_f32(reader: gguf.GGUFReader) -> None:
    for tensor in reader.tensors:
        wanted = "F32" if len(tensor.shape) == 1 else "Q8_0"
        assert tensor.tensor_type.name == wanted, tensor.name


def test_its_vocabulary_is_byte_level_with_chat_marks(reader: gguf.GGUFReader) -> None:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    eos = int(str(fact(reader, "tokenizer.ggml.eos_token_id")))

    assert (fact(reader, "tokenizer.ggml.model"), fact(reader, "tokenizer.ggml.pre")) == ("gpt2", "qwen2")
    assert len(set(tokens)) == len(tokens)
    assert len(tokens) % 256 == 0
    assert sum(len(token) == 1 for token in tokens) == 256
    assert sorted(controls) == sorted(SPECIAL)
    assert tokens[eos] == "<|im_end|>"
    assert fact(reader, "tokenizer.ggml.add_bos_token") is False


def test_any_bytes_come_back_from_its_tokens() -> None:
    _, tokenizer = read_gguf(GGUF_FILE)
    text = "Zoë 北京 \N{SLIGHTLY SMILING FACE} 12345\n\ttab  two"

    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("12345").ids) == 5


def test_its_chat_template_is_chatml_with_or_without_a_system_message(reader: gguf.GGUFReader) -> None:
    template = jinja2.Template(str(fact(reader, "tokenizer.chat_template")))
    user = {"role": "user", "content": "Hi"}

    assert template.render(messages=[user], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(messages=[{"role": "system", "content": "Be brief."}, user]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


def test_it_says_what_it_is(reader: gguf.GGUFReader) -> None:
    assert fact(reader, "general.name") == "prima-builtin"
    assert str(fact(reader, "general.license")).lower() == "mit"
    assert "demonstration" in str(fact(reader, "general.description"))


def test_the_card_stands_beside_it() -> None:
    card = CARD_FILE.read_text(encoding="utf-8").lower()

    assert all(word in card for word in ("demonstration", "mit", "python -m training.train", "held-out"))
