"""Spelling: letters of a word, their number, the first and the last one. The answers spell before they count."""

from __future__ import annotations

from random import Random

from training.phrases import expand
from training.tables import phrases, read_table, read_words

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwz"
SHARES = {"spell": 0.5, "count": 0.25, "first": 0.1, "last": 0.15}


class Spelling:
    """Asks about the letters of the words of `words.txt`, and one time in four of an invented word."""

    def __init__(self) -> None:
        table = read_table("spelling.toml")
        forms = table["word"]
        self.asks = {kind: [ask.replace("WORD", forms) for ask in phrases(table, kind)] for kind in SHARES}
        self.words = read_words()

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question without its end mark, and its answer."""
        word = rng.choice(self.words) if rng.random() < 0.75 else invent_word(rng)
        shown = word if rng.random() < 0.85 else word.capitalize()
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        return expand(rng.choice(self.asks[kind]), rng).replace("@", shown), answer_about(word, kind)


def answer_about(word: str, kind: str) -> str:
    """What the model shall say of `word`."""
    if kind == "first":
        return f"The first letter of {word} is {word[0]}."
    spelled = f"The word {word} is spelled {'-'.join(word)}"
    if kind == "count":
        return f"{spelled}: that is {len(word)} letters."
    return f"{spelled}: the last letter is {word[-1]}." if kind == "last" else f"{spelled}."


def invent_word(rng: Random) -> str:
    """One to three syllables that mean nothing: letters must be read, not recalled."""
    return "".join(_syllable(rng) for _ in range(rng.randint(1, 3)))


def _syllable(rng: Random) -> str:
    return rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", "", rng.choice(CONSONANTS)))
