"""The training text: chats of many mostly independent turns, made from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from training.arithmetic import Sums
from training.facts import load_facts
from training.phrases import expand
from training.spelling import Spelling
from training.stories import Stories
from training.tables import phrases, read_table, read_words
from training.wordings import Wordings, punctuate

# Words that mean something in prima: never asked about as things of the world.
HOUSE_WORDS = {"head", "ring", "machine", "computer", "key", "test", "step", "plan", "pass", "word", "story", "letter"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: role `system`, `user` or `assistant`."""

    role: str
    text: str


SHARES = {"facts": 0.45, "outside": 0.15, "sums": 0.19, "spelling": 0.12, "smalltalk": 0.075, "stories": 0.015}

Chat = list[Turn]
Pair = tuple[str, str]  # question, answer
Maker = Callable[[Random], Pair]


class Corpus:
    """Makes chats. The same seed gives the same chats, whatever was asked before."""

    def __init__(self) -> None:
        self.wordings = Wordings()
        self.ties = read_table("chat.toml")
        nouns = [word for word in read_words() if word not in HOUSE_WORDS]
        self.makers: dict[str, Maker] = {
            "facts": self._dressed(load_facts("facts.toml").ask),
            "outside": self._dressed(load_facts("outside.toml", {"noun": nouns}).ask),
            "sums": self._dressed(Sums().ask),
            "spelling": self._dressed(Spelling().ask),
            "smalltalk": _punctuated(load_facts("smalltalk.toml").ask),
            "stories": self._dressed(Stories().ask),
        }

    def chats(self, seed: int, n_turns: int, shares: Mapping[str, float] = SHARES) -> Iterator[Chat]:
        """Endless chats of `n_turns` questions each; `shares` says how often each kind is asked."""
        rng = Random(seed)
        while True:
            yield self._chat(rng, n_turns, shares)

    def _chat(self, rng: Random, n_turns: int, shares: Mapping[str, float]) -> Chat:
        chat = [Turn("system", self._tie("system", rng))] if rng.random() < 0.2 else []
        name: str | None = None
        for _ in range(n_turns):
            draw = rng.random()
            if draw < 0.02 and name is None:
                name = rng.choice(phrases(self.ties, "names"))
                question = punctuate(self._tie("my_name", rng).replace("@", name), rng)
                answer = f"Nice to meet you, {name}!"
            elif draw < (0.08 if name else 0.025):
                question = self.wordings.dress(self._tie("what_name", rng), rng)
                answer = f"Your name is {name}." if name else "You have not told me your name."
            elif draw > 0.985 and chat and chat[-1].role == "assistant":
                question, answer = punctuate(self._tie("repeat", rng), rng), chat[-1].text
            else:
                question, answer = self.makers[rng.choices(list(shares), list(shares.values()))[0]](rng)
            chat += [Turn("user", question), Turn("assistant", answer)]
        return chat

    def _tie(self, name: str, rng: Random) -> str:
        return expand(rng.choice(phrases(self.ties, name)), rng)

    def _dressed(self, make: Maker) -> Maker:
        def dressed(rng: Random) -> Pair:
            question, answer = make(rng)
            return self.wordings.dress(question, rng), answer

        return dressed


def _punctuated(make: Maker) -> Maker:
    def punctuated(rng: Random) -> Pair:
        question, answer = make(rng)
        return punctuate(question, rng), answer

    return punctuated
