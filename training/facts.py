"""Questions with one answer each: `facts.toml` (and files of its form) in many sentence forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from training.phrases import Table, expand
from training.tables import read_table


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and the pattern lists that lead to it, keyed by kind of frame."""

    answer: str
    patterns: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts of a file, the phrases that their patterns may name, and the frames they are put into."""

    facts: Sequence[Fact]
    phrases: Table
    frames: Table

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question in plain lower case without its end mark, and its answer."""
        fact = rng.choice(self.facts)
        kinds = list(fact.patterns)
        weights = [len(fact.patterns[kind]) ** 0.5 for kind in kinds]
        kind = rng.choices(kinds, weights)[0]
        inside = expand(rng.choice(fact.patterns[kind]), rng, self.phrases)
        return expand(rng.choice(self.frames[kind]), rng).replace("@", inside), fact.answer


def load_facts(name: str, extra_phrases: Table | None = None) -> Facts:
    """Read a file in the form of `facts.toml`. Raises ValueError when a fact lacks its answer or has odd patterns."""
    table, frames = read_table(name), read_table("frames.toml")
    facts = [_fact(entry, frames) for entry in table["fact"]]
    return Facts(facts, {**table["phrases"], **(extra_phrases or {})}, frames)


def _fact(entry: Mapping[str, Any], frames: Table) -> Fact:  # Any: what TOML holds, checked here
    patterns = {key: value for key, value in entry.items() if key != "answer"}
    answer = entry.get("answer")
    if not isinstance(answer, str) or not patterns or not patterns.keys() <= frames.keys():
        raise ValueError(f"a fact needs an answer and patterns of {sorted(frames)}: {dict(entry)!r}")
    return Fact(answer, patterns)
