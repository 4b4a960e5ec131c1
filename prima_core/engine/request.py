"""What a client asked for, and what comes back: plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prima_core.errors import PrimaError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0: the most likely one. Every default cuts and changes nothing.

    `logprobs`: how many of the likeliest tokens to tell beside the drawn one; None: tell nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids and how to go on from it. `stop` strings end the text and are not part of it."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token. `logprob` is its natural logarithm of softmax(logits), before any cut, penalty or temperature;
    `top` are the likeliest tokens with theirs, falling. Both only where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown now (maybe empty), and the token that brought it."""

    text: str
    sampled: Sampled

    @property
    def token(self) -> int:
        return self.sampled.token


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that went well or was cancelled; `text` is what was still held back.

    `n_cached` tokens of the prompt were not computed again, because an earlier sequence began with them.
    """

    reason: FinishReason
    text: str
    n_prompt: int
    n_generated: int
    n_cached: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that was ended by a fault."""

    error: PrimaError


Event = Piece | Finished | Failed
