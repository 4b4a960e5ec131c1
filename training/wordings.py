"""What people do to a question: greetings before it, thanks behind it, other words, slips of the keyboard."""

from __future__ import annotations

from random import Random

from training.phrases import expand
from training.tables import phrases, read_table

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
# Names that keep their capitals in a sentence that begins with one.
CAPITALS = {" i ": " I ", " i'": " I'", "openai": "OpenAI", " llm": " LLM"}


class Wordings:
    """Dresses plain questions in the manners of `wordings.toml`."""

    def __init__(self) -> None:
        table = read_table("wordings.toml")
        self.openers, self.closers = phrases(table, "openers"), phrases(table, "closers")
        self.synonyms = {word: phrases(table["synonyms"], word) for word in table["synonyms"]}

    def dress(self, question: str, rng: Random) -> str:
        """A wording of `question` as a person may type it."""
        text = self._exchange(question, rng)
        if rng.random() < 0.28:
            text = expand(rng.choice(self.openers), rng) + text
        if rng.random() < 0.16:
            text += expand(rng.choice(self.closers), rng)
        if rng.random() < 0.10:
            text = _slip(text, rng)
        return punctuate(text, rng)

    def _exchange(self, text: str, rng: Random) -> str:
        for word, others in self.synonyms.items():
            if rng.random() < 0.18 and f" {word} " in f" {text} ":
                text = f" {text} ".replace(f" {word} ", f" {rng.choice(others)} ", 1).strip()
        return text


def punctuate(text: str, rng: Random) -> str:
    """`text` with or without a capital and an end mark."""
    style = rng.random()
    if style < 0.55:
        return _capital(text) + rng.choices(("?", ".", "!", ""), (0.80, 0.10, 0.04, 0.06))[0]
    if style < 0.80:
        return text + rng.choices(("", "?"), (0.6, 0.4))[0]
    return _capital(text) if style < 0.9 else text.lower() + rng.choice(("?", "", " ?", "??", "..."))


def _slip(text: str, rng: Random) -> str:
    """A letter left out, replaced, doubled or swapped with the next one."""
    at = rng.randrange(len(text))
    before, letter, behind = text[:at], text[at], text[at + 1 :]
    if not letter.isalpha():
        return text
    other = rng.choice(ALPHABET)
    swapped = behind[:1] + letter + behind[1:]
    return before + rng.choice((behind, other + behind, swapped, letter + letter + behind))


def _capital(text: str) -> str:
    rest = text[1:]
    for plain, written in CAPITALS.items():
        rest = rest.replace(plain, written)
    return text[:1].upper() + rest
