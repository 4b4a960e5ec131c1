"""What a client asked for, and what comes back: plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prima_core.errors import PrimaError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0: the most likely one. top_k 0 and top_p 1: no cut."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
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


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown now (maybe empty), and the token that brought it."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that went well or was cancelled; `text` is what was still held back."""

    reason: FinishReason
    text: str
    n_prompt: int
    n_generated: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that was ended by a fault."""

    error: PrimaError


Event = Piece | Finished | Failed
