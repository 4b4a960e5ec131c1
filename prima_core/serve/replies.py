"""What the bodies of all kinds of answers are made of. No I/O."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prima_core.engine.request import Finished, Sampled

NO_CHANCE = -9999.0
"""What stands for the logarithm of no probability at all: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer grows by: text, and the tokens that brought it. `finish_reason` is told with the last one."""

    content: str = ""
    sampled: tuple[Sampled, ...] = ()
    finish_reason: str | None = None
    reasoning: str = ""


def joined(deltas: Iterable[Delta]) -> Delta:
    """All of an answer as one."""
    deltas = tuple(deltas)
    return Delta(
        "".join(delta.content for delta in deltas),
        tuple(sampled for delta in deltas for sampled in delta.sampled),
        next((delta.finish_reason for delta in deltas if delta.finish_reason), None),
        "".join(delta.reasoning for delta in deltas),
    )


@dataclass(frozen=True, slots=True)
class Heading:
    """What every body of one answer begins with; `model` is the name that the server tells."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, kind: str, model: str, fingerprint: str) -> Heading:
        return cls(f"{kind}-{secrets.token_hex(12)}", int(time.time()), model, fingerprint)

    def body(self, kind: str, **rest: object) -> dict[str, object]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, **rest}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole answer. A prompt counts once, however many choices it has."""

    n_prompt: int
    n_cached: int
    n_generated: int
    n_reasoning: int = 0

    @classmethod
    def of(cls, ends: Sequence[Finished], n_choices: int, n_reasoning: int) -> Usage:
        """`ends` of each prompt's choices in order. Of a prompt only what no choice computed counts as cached."""
        groups = [ends[at : at + n_choices] for at in range(0, len(ends), n_choices)]
        return cls(
            sum(group[0].n_prompt for group in groups),
            sum(min(end.n_cached for end in group) for group in groups),
            sum(end.n_generated for end in ends),
            n_reasoning,
        )

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
            "completion_tokens_details": {"reasoning_tokens": self.n_reasoning},
        }


def finite(logprob: float) -> float:
    return max(logprob, NO_CHANCE)
