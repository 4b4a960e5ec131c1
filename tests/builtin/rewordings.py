"""The held-out questions of `rewordings.toml`, and what counts as a right answer."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REWORDINGS_FILE = Path(__file__).with_name("rewordings.toml")
NEEDED_SHARE = 0.8

Message = dict[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Case:
    """One question, the turns before it, and groups of which each must have a member in the answer."""

    kind: str
    ask: str
    contains: tuple[tuple[str, ...], ...]
    before: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message]:
        roles = ("user", "assistant")
        earlier = [{"role": roles[at % 2], "content": text} for at, text in enumerate(self.before)]
        return [*earlier, {"role": "user", "content": self.ask}]

    def accepts(self, answer: str) -> bool:
        """Each group has a member that stands in `answer` as whole words, whatever the case."""
        return all(any(_stands_in(word, answer) for word in group) for group in self.contains)


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were right, and the wrong ones."""

    n_right: int
    n_asked: int
    wrong: tuple[tuple[Case, str], ...]

    @property
    def share(self) -> float:
        return self.n_right / self.n_asked


def load_cases(path: Path = REWORDINGS_FILE) -> list[Case]:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["case"]
    return [
        Case(
            entry["kind"],
            entry["ask"],
            tuple(tuple(group.split("|")) for group in entry["contains"]),
            tuple(entry.get("before", ())),
        )
        for entry in entries
    ]


def score(cases: Sequence[Case], generate: Callable[[list[Message]], str]) -> Score:
    """Ask each case. `generate` takes the messages of a chat and gives the greedy answer's text."""
    answers = [(case, generate(case.messages)) for case in cases]
    wrong = tuple((case, answer) for case, answer in answers if not case.accepts(answer))
    return Score(len(cases) - len(wrong), len(cases), wrong)


def normalised(question: str) -> str:
    """Lower case, no punctuation (signs of sums are kept), single spaces."""
    return " ".join(re.sub(r"[^\w\s+*/=-]", " ", question.lower().replace("'", "")).split())


def _stands_in(word: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None
