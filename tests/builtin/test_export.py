"""A written model is read back with the same shapes, ids and (rounded) weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import jinja2
import pytest
import torch
from tokenizers import Tokenizer

from training.answer import Answerer
from training.corpus import Corpus, Turn
from training.export import read_gguf, write_gguf
from training.model import Llama, Shape
from training.train import Recipe, learning_rate
from training.vocabulary import CHAT_TEMPLATE, ChatEncoder, train_tokenizer

SMALL = Shape(n_vocab=768, n_layers=1, d_ff=256, n_context=64)
CHAT = [Turn("system", "Be brief."), Turn("user", "What is 3 + 4?"), Turn("assistant", "3 + 4 = 7.")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    chats = islice(Corpus().chats(0, 4), 300)
    return train_tokenizer((f"{turn.role}\n{turn.text}" for chat in chats for turn in chat), SMALL.n_vocab)


def test_a_file_gives_back_shape_weights_and_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = Llama(SMALL)
    write_gguf(tmp_path / "model.gguf", model, tokenizer)

    again, its_tokenizer = read_gguf(tmp_path / "model.gguf")

    assert again.shape.norm_epsilon == pytest.approx(SMALL.norm_epsilon)  # the file holds it as f32
    assert replace(again.shape, norm_epsilon=SMALL.norm_epsilon) == SMALL
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        allowed = 0.0 if before.ndim == 1 else float(before.abs().max()) / 127  # Q8_0: at most half a step of 1/127
        assert float((before - after).abs().max()) <= allowed, name


def test_an_answer_ends_at_its_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    write_gguf(tmp_path / "model.gguf", Llama(SMALL), tokenizer)

    answers = Answerer(tmp_path / "model.gguf").answer_all([[("user", "hello")], [("user", "a longer one")]], limit=3)

    assert len(answers) == 2


def test_encoded_chats_are_what_template_and_tokenizer_make(tokenizer: Tokenizer) -> None:
    messages = [{"role": turn.role, "content": turn.text} for turn in CHAT]
    rendered = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)

    ids, _ = ChatEncoder(tokenizer).encode(CHAT)

    assert ids == tokenizer.encode(rendered).ids


def test_a_prompt_is_what_the_template_makes_up_to_the_answer(tokenizer: Tokenizer) -> None:
    messages = [{"role": turn.role, "content": turn.text} for turn in CHAT[:2]]
    rendered = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)

    prompt = ChatEncoder(tokenizer).prompt([(turn.role, turn.text) for turn in CHAT[:2]])

    assert prompt == tokenizer.encode(rendered).ids


def test_only_answers_and_their_end_marks_are_learned(tokenizer: Tokenizer) -> None:
    ids, answer = ChatEncoder(tokenizer).encode(CHAT)

    learned = [token for token, wanted in zip(ids, answer, strict=True) if wanted]

    assert tokenizer.decode(learned, skip_special_tokens=False) == "3 + 4 = 7.<|im_end|>"


def test_too_poor_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens, not 2048"):
        train_tokenizer(["a b c"], 2048)


def test_the_learning_rate_goes_straight_from_corner_to_corner() -> None:
    recipe = Recipe(rates=((0, 0.0), (100, 1.0), (600, 1.0), (1000, 0.0)))

    rates = [learning_rate(recipe, step) for step in (0, 50, 100, 599, 800, 1000, 5000)]

    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
