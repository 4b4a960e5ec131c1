"""Vocabularies in which every border between words shows, and texts that are hard to split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from string import digits, printable
from typing import Any

from prima_core.model.vocabulary import TokenKind
from tests.model.small_vocabulary import BYTES

FIXTURE = Path(__file__).with_name("fixtures") / "llamacpp-splits.json"
RAW = ("gemma4", "sarvam-moe", "granite-embed-multi-311m")

_MAX_GRAM = 5
_LENGTHS = digits + "abcdefghijklmnopqrstuvwxyz"
# Letters of every case and none, marks, numbers, signs and spaces, each in ASCII and outside; what is not assigned,
# what joins emoji, and what patterns name.
_BITS = [
    *("a", "b", "Ab", "XY", "xYz", "\u00e9", "\u00c9", "\u00df", "\u0436", "\u0416", "\u01c5", "\u02b0", "\u00aa"),
    *("\u4e2d\u6587", "\u3005", "\u3007", "\u3042", "\u30a2", "\uff71", "\u3105", "\uac00\ub098", "\u3131", "\u1100"),
    *("\u0e01\u0e33", "\u0e31", "\u0301", "\u093f", "\u0928", "\u1780", "\ua9e0", "\u9fff", "\U00020000", "\uf900"),
    *("0", "12", "345", "6789", "1234567", "\u00b2", "\u00bd", "\u0663", "\u2167", "\uff11"),
    *(".", ",", "!", "?", "'", '"', "(", ")", "/", "-", "_", "#", "%", "&", "*", ";", "[", "]", "{", "}", "@", "\\"),
    *(
        "$",
        "+",
        "<",
        "=",
        ">",
        "^",
        "`",
        "|",
        "~",
        "\u20ac",
        "\u2026",
        "\u3002",
        "\uff0c",
        "\u0964",
        "\u060c",
        "\u201c",
    ),
    *("\u00ab", "\u2019", "\u00d7", "\u2603", "\U0001f600", "\U0001f469\u200d\U0001f52c", "\ufe0f", "\u200b", "\ufeff"),
    *(" ", " ", " ", "  ", "   ", "    ", "\t", "\n", "\n", "\n\n", "\r\n", "\r", "\v", "\u00a0", "\u3000", "\u2028"),
    *("\x85", "\x00", "\x1c", "\u0378", "\ue000", "'s", "'S", "'ll", "'LL", "'Re", "'d", "'x", "\u2019s"),
]
_CHOSEN = [
    "I'm sure they'Ve done it's 'Tis WE'LL can't",
    "camelCase HTTPServer \u00c9cole \u00e9COLE XMLhttp2Request aB\u00c9c",
    "1 12 123 1234 12345 123456 1234567 12,345.678 x1234y 12\u00bd123 123\u00bd 1234\u00bd56 \u00bd1234",
    "<sentinel:12>IMGIMGABCZ IMGIMGJZ  \tx    y",
    "\n\n\n\n \n  \n\t\n x \n\n y\n",
    "a" + " " * 40 + "b" + " " * 17 + "\n" + " " * 5,
    "if (x) {\r\n\treturn y[0]; // ok\r\n}\r\n",
    "\u4eca\u65e5\u306f\u3001\u5929\u6c17\u304c\u826f\u3044\u3002\u3005\u3007",
    "\uc548\ub155\ud558\uc138\uc694 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u3000\u3000\u3002 \u2028\u3000</ \u3000\u4e2d\u3000x\u00a0\u00a0y",
    "x y z a b c e\u0301 f\u0301g",
    "_foo/bar//baz /path/to\n#!/bin/sh ...\n///\n",
]


def texts(vectors: Sequence[str]) -> list[str]:
    """llama.cpp's own test texts, chosen ones, and random ones."""
    rng = random.Random(5)
    return [*vectors, *_CHOSEN, *("".join(rng.choices(_BITS, k=rng.randrange(3, 15))) for _ in range(110))]


@dataclass(frozen=True, slots=True)
class SplitVocabulary:
    """`tokens` by id, `merges` in order. Some tokens no merge makes: they show whether whole words are looked up."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    kinds: tuple[int, ...]

    def metadata(self, pre: str) -> dict[str, Any]:
        values = {
            "model": "gemma4" if pre == "gemma4" else "gpt2",
            "pre": pre,
            "tokens": list(self.tokens),
            "token_type": list(self.kinds),
            "merges": list(self.merges),
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return {f"tokenizer.ggml.{name}": value for name, value in values.items()}

    def lengths(self, ids: Sequence[int]) -> str:
        """How long each token is, a character for each."""
        return "".join(_LENGTHS[len(self.tokens[id])] for id in ids)


def byte_level(texts: Sequence[str]) -> SplitVocabulary:
    spelled = ["".join(BYTES[byte] for byte in text.encode()) for text in texts]
    words = chain.from_iterable(text.replace("\u0120", " \u0120").split() for text in spelled)
    return _vocabulary([], BYTES, spelled, [word for word in words if _MAX_GRAM < len(word) < len(_LENGTHS)])


def raw(texts: Sequence[str]) -> SplitVocabulary:
    """Characters outside the basic plane and those that are no letters of it are left to bytes."""
    lines = [line for text in texts for line in text.replace(" ", "\u2581").split("\n")]
    known = {*filter(str.isalnum, chain.from_iterable(lines)), *printable, "\u2581"} - set(" \U00020000")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    grams = [part for line in lines for part in _known_parts(line, known)]
    return _vocabulary(byte_tokens, sorted(known), grams, ["\n" * n for n in range(2, 31)])


def _known_parts(line: str, known: set[str]) -> list[str]:
    return "".join(character if character in known else "\n" for character in line).split("\n")


def _vocabulary(
    byte_tokens: Sequence[str], letters: Sequence[str], spelled: Sequence[str], words: Sequence[str]
) -> SplitVocabulary:
    merges = tuple(dict.fromkeys(chain.from_iterable(map(_grams, spelled))))
    normal = dict.fromkeys([*letters, *(merge.replace(" ", "") for merge in merges), *words])
    tokens = ("<s>", *byte_tokens, *normal)
    kinds = [TokenKind.CONTROL, *[TokenKind.BYTE] * len(byte_tokens), *[TokenKind.NORMAL] * len(normal)]
    return SplitVocabulary(tokens, merges, tuple(map(int, kinds)))


def _grams(text: str) -> Iterator[str]:
    """Merges that grow from each place of a text to the right, so that what is no border is crossed."""
    for begin in range(len(text)):
        for end in range(begin + 2, min(begin + _MAX_GRAM, len(text)) + 1):
            yield f"{text[begin : end - 1]} {text[end - 1]}"


@cache
def fixture() -> Mapping[str, Any]:
    """`texts`; for each of them the different `lengths` of tokens; for each pre-tokenizer which of these, `add_bos`."""
    return json.loads(FIXTURE.read_text("utf-8"))  # type: ignore[no-any-return]  # written by the script beside it
