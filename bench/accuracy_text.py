"""bench/accuracy.py: text that the built-in model was not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from prima_core.model.tokenizer import Tokenizer
from tests.builtin.rewordings import load_cases
from training.corpus import Corpus

UNSEEN_SEED = 1
"""Batches draw theirs from 64 bits, the vocabulary has another: see training/batches.py."""
N_CHATS, N_TURNS = 4, 8


def held_out(tokenizer: Tokenizer) -> list[list[int]]:
    """Texts as ids: the questions of `rewordings.toml`, up to where the answer begins, and whole chats."""
    return [tokenizer.encode(text, parse_special=True) for text in (*_questions(), *_chats())]


def _questions() -> Iterator[str]:
    for case in load_cases():
        turns = ((message["role"], message["content"]) for message in case.messages)
        yield "".join(_turn(*turn) for turn in turns) + "<|im_start|>assistant\n"


def _chats() -> Iterator[str]:
    for chat in islice(Corpus().chats(UNSEEN_SEED, N_TURNS), N_CHATS):
        yield "".join(_turn(turn.role, turn.text) for turn in chat)


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"
