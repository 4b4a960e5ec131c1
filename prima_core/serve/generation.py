"""What chats and completions have in common: the fields that say how to generate, and the engine's requests."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from prima_core.engine.engine import MAX_BIASES
from prima_core.engine.request import Request, Sampling, answer_tokens
from prima_core.errors import RequestError
from prima_core.serve.bodies import Neutral, without_neutral

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_WINDOW = 2**20

UNSUPPORTED_IN_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]
Factor = Annotated[float, Meta(ge=0.01, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenName = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class GenerationBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields that both kinds of body have. None: the server's default. `model` may be any: one is served.

    Beside OpenAI's: top_k, min_p, typical_p, min_tokens, ignore_eos and repetition_penalty, named as everywhere;
    llama.cpp's names of the last one, repeat_penalty and its window repeat_last_n, do as well.
    """

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Factor | None = None
    repeat_penalty: Factor | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=MAX_WINDOW)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Meta(max_length=MAX_BIASES)] | None = None

    prompt_field: ClassVar[str]
    """The field to blame when the prompt is too long."""

    @property
    def n_most(self) -> int | None:
        """How many tokens an answer may have; None: what the context has room for."""
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """As in `Sampling`."""
        return None

    @property
    def n_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def check_stream_options(fields: dict[str, Any]) -> None:  # Any: JSON
    """Take what asks for nothing out of `stream_options`."""
    if "stream_options" in fields:
        options = fields["stream_options"]
        fields["stream_options"] = without_neutral(options, UNSUPPORTED_IN_STREAM_OPTIONS, "stream_options.")


@dataclass(frozen=True, slots=True)
class Served:
    """What a request must fit to; `sampling` is what it gets where it says nothing."""

    context_length: int
    context_shift: bool
    vocab_size: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; the first `n_keep` stay when the context shifts."""

    ids: tuple[int, ...]
    n_keep: int = 0


def to_requests(body: GenerationBody, prompts: Sequence[Prompt], served: Served) -> list[Request]:
    """The engine's requests: for each prompt as many as choices are asked for, with seeds that rise by one.

    Wanted tokens are cut to the room that the context has left, unless it shifts. Raises RequestError for a prompt
    longer than the context, and for fields that contradict each other or the model.
    """
    sampling = _sampling(body, served)
    seeds = [_wrapped(sampling.seed + choice) for choice in range(body.n_choices)]
    return [_request(body, prompt, replace(sampling, seed=seed), served) for prompt in prompts for seed in seeds]


def _request(body: GenerationBody, prompt: Prompt, sampling: Sampling, served: Served) -> Request:
    n_prompt, n_least = len(prompt.ids), body.min_tokens or 0
    if n_prompt > served.context_length:
        raise RequestError(
            f"the prompt has {n_prompt} tokens, the context has {served.context_length}",
            param=body.prompt_field,
            code="context_length_exceeded",
            hint="send less, or serve with a longer context (-c)",
        )
    if body.n_most is not None and n_least > body.n_most:
        raise RequestError(f"min_tokens {n_least} is more than max_tokens {body.n_most}", param="min_tokens")
    n_most = answer_tokens(body.n_most, n_prompt, served.context_length, served.context_shift)
    return Request(
        prompt.ids,
        n_most,
        sampling,
        body.stops,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=min(n_least, n_most),
        n_keep=prompt.n_keep,
    )


def _sampling(body: GenerationBody, served: Served) -> Sampling:
    told = {name: value for name in AS_NAMED if (value := getattr(body, name)) is not None}
    if told.get("top_k") == -1:  # as 0: all tokens
        told["top_k"] = 0
    return replace(
        served.sampling,
        **told,
        **_repetition(body),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logit_bias=_biases(body.logit_bias or {}, served.vocab_size),
        logprobs=body.n_logprobs,
    )


AS_NAMED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty")


def _repetition(body: GenerationBody) -> dict[str, Any]:  # Any: fields of Sampling
    """The penalty under either name, and its window."""
    penalties = {value for value in (body.repetition_penalty, body.repeat_penalty) if value is not None}
    if len(penalties) > 1:
        raise RequestError("repetition_penalty and repeat_penalty contradict each other", param="repeat_penalty")
    told: dict[str, Any] = {"repetition_window": body.repeat_last_n} if body.repeat_last_n is not None else {}
    return {**told, "repetition_penalty": penalties.pop()} if penalties else told


def _biases(told: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = tuple((int(name), float(bias)) for name, bias in told.items())
    wrong = next((token for token, _ in biases if token >= vocab_size), None)
    if wrong is not None:
        raise RequestError(f"logit_bias names token {wrong}, the model has {vocab_size}", param="logit_bias")
    return biases


def _wrapped(seed: int) -> int:
    """In the 64 bits that a seed has."""
    return (seed + 2**63) % 2**64 - 2**63
