"""What a client asked for, and what comes back: plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prima_core.errors import PrimaError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; `sampler.py` has the order. Every default cuts and changes nothing.

    `temperature` 0: the likeliest token. `top_k` 0: all tokens.
    `repetition_penalty` looks at the last `repetition_window` tokens of prompt and answer (as llama.cpp's
    repeat_penalty and repeat_last_n; 0: at none, -1: at all, as vLLM), once at each token: a positive logit is divided
    by it, another one multiplied. The other penalties look at the answer only (as OpenAI and vLLM; llama.cpp counts in
    the window): `frequency_penalty` is taken off the logit for every time that the token came, `presence_penalty` once.
    `logit_bias` is added to the logits of these tokens; -infinity bans one.
    `logprobs`: how many of the likeliest tokens to tell beside the drawn one; None: tell nothing.
    `seed`: the same seed gives the same tokens, whatever the company.
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
    """A prompt as token ids and how to go on from it. `stop` strings end the text and are not part of it.

    `ignore_eos`: go on past tokens that end the generation (as vLLM; llama.cpp bans them).
    `min_tokens`: so many are generated before such a token can be drawn or a stop string is looked for (as vLLM).
    `reuse_prefix`: the part that an earlier sequence began with need not be computed again.
    `n_keep`: tokens of the prompt's begin that stay when the context shifts, at most half a context; the first stays
    always.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    reuse_prefix: bool = True
    n_keep: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token. `logprob` is its natural logarithm of softmax(logits), as the model computed them: before bias,
    penalties, temperature and cuts, as OpenAI, vLLM and llama.cpp's server tell it. `top` are the likeliest tokens with
    theirs, falling; tokens of no probability are left out. Both only where they were asked for."""

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

    `n_cached` tokens of the prompt were not computed again, because an earlier sequence began with them. `n_shifted`
    tokens of prompt and answer were forgotten on the way, because the context was full and shifts.
    """

    reason: FinishReason
    text: str
    n_prompt: int
    n_generated: int
    n_cached: int = 0
    n_shifted: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that was ended by a fault."""

    error: PrimaError


Event = Piece | Finished | Failed


def answer_tokens(wanted: int | None, n_prompt: int, context_length: int, context_shift: bool = False) -> int:
    """`Request.max_tokens` of an answer for which `wanted` tokens are asked for (None: nothing is said).

    Where the context shifts: as many as wanted, else as many as a context has. Otherwise never more than the room that
    the prompt leaves (the last token needs none): below 1 where the prompt is too long.
    """
    if context_shift:
        return wanted or context_length
    room = context_length - n_prompt + 1
    return min(wanted or room, room)
