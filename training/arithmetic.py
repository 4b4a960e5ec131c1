"""Small sums: both numbers below 100 for plus and minus, up to 12 for times."""

from __future__ import annotations

import re
from random import Random

from training.phrases import expand
from training.tables import phrases, read_table

NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
LIMITS = (10, 20, 20, 50, 99)
SIGNS = {"plus": "+", "minus": "-", "times": "x"}


class Sums:
    """Asks for sums in the wordings of `arithmetic.toml`."""

    def __init__(self) -> None:
        self.table = read_table("arithmetic.toml")

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question in lower case without its end mark, and the answer as an equation."""
        kind = rng.choices(list(SIGNS), (0.42, 0.36, 0.22))[0]
        a, b = _numbers(kind, rng)
        result = {"plus": a + b, "minus": a - b, "times": a * b}[kind]
        return self._question(kind, a, b, rng), f"{a} {SIGNS[kind]} {b} = {result}."

    def _question(self, kind: str, a: int, b: int, rng: Random) -> str:
        pattern = self._pattern(kind, rng)
        as_words = rng.random() < 0.12
        written = {"A": _written(a, as_words), "B": _written(b, as_words)}
        return re.sub(r"\b[AB]\b", lambda found: written[found.group()], pattern)

    def _pattern(self, kind: str, rng: Random) -> str:
        form = rng.random()
        if form < 0.62:
            inside = expand(rng.choice(phrases(self.table["sum"], kind)), rng)
            return expand(rng.choice(phrases(self.table, "asks")), rng).replace("@", inside)
        if form < 0.78:
            return expand(rng.choice(phrases(self.table["order"], kind)), rng)
        told = expand(rng.choice(phrases(self.table["story"], kind)), rng)
        told = told.replace("THINGS", rng.choice(phrases(self.table, "things")))
        return told.replace("PERSON", rng.choice(phrases(self.table, "people")))


def _numbers(kind: str, rng: Random) -> tuple[int, int]:
    if kind == "times":
        return rng.randint(0 if rng.random() < 0.1 else 1, 12), rng.randint(1, 12)
    limit = rng.choice(LIMITS)
    a, b = rng.randint(0, limit), rng.randint(0, limit if rng.random() < 0.6 else min(limit, 12))
    return (max(a, b), min(a, b)) if kind == "minus" else (a, b)


def _written(number: int, as_words: bool) -> str:
    return NUMBER_WORDS[number] if as_words and number < len(NUMBER_WORDS) else str(number)
