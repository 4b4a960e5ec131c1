"""Small grammar: `{a|b|}` picks one of its parts, parts nest, `$name` asks a table of further phrases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

Table = Mapping[str, Sequence[str]]
DEPTH_LIMIT = 20


@dataclass(frozen=True, slots=True)
class Choice:
    """Parts of which one is taken."""

    parts: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A name in the table of phrases."""

    name: str


Phrase = tuple[str | Choice | Name, ...]


def expand(pattern: str, rng: Random, table: Table | None = None) -> str:
    """One seeded random reading of `pattern`. Raises ValueError for unbalanced braces or an unknown name."""
    return _read(_parse(pattern), rng, table or {}, 0)


def _read(phrase: Phrase, rng: Random, table: Table, depth: int) -> str:
    if depth > DEPTH_LIMIT:
        raise ValueError(f"phrases nest deeper than {DEPTH_LIMIT}: {phrase!r}")
    pieces: list[str] = []
    for piece in phrase:
        if isinstance(piece, str):
            pieces.append(piece)
        elif isinstance(piece, Choice):
            pieces.append(_read(rng.choice(piece.parts), rng, table, depth + 1))
        elif piece.name in table:
            pieces.append(_read(_parse(rng.choice(table[piece.name])), rng, table, depth + 1))
        else:
            raise ValueError(f"no phrases are named {piece.name!r}")
    return "".join(pieces)


@lru_cache(maxsize=20_000)  # a run reads the same few thousand patterns over and over
def _parse(pattern: str) -> Phrase:
    phrase: list[str | Choice | Name] = []
    at = 0
    while at < len(pattern):
        end = at + 1
        if pattern[at] == "{":
            end = _closing(pattern, at)
            phrase.append(Choice(tuple(_parse(part) for part in _parts(pattern[at + 1 : end - 1]))))
        elif pattern[at] == "$":
            end = _end(pattern, at + 1, lambda letter: letter.isalpha() or letter == "_")
            phrase.append(Name(pattern[at + 1 : end]))
        else:
            end = _end(pattern, at, lambda letter: letter not in "{$")
            phrase.append(pattern[at:end])
        at = end
    return tuple(phrase)


def _closing(pattern: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`."""
    depth = 0
    for at in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"brace without an end in {pattern!r}")


def _parts(inside: str) -> list[str]:
    parts, depth = [""], 0
    for letter in inside:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _end(pattern: str, at: int, belongs: Callable[[str], bool]) -> int:
    while at < len(pattern) and belongs(pattern[at]):
        at += 1
    return at
