"""OpenAI's chat completion format: bodies to requests, events to bodies. No I/O.

A field that asks for something this version lacks is an error that names it; its neutral value is accepted.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from prima_core.engine.request import Finished, Request, Sampling, answer_tokens
from prima_core.errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_MESSAGES = 4096

Neutral = Mapping[str, tuple[object, ...]]
"""Fields of OpenAI's API that this version does not act on, with the values, besides null, that ask for nothing."""

UNSUPPORTED: Neutral = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
UNSUPPORTED_IN_MESSAGE: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""An answer's message comes back as part of the next request, with the fields that were empty in it."""
UNSUPPORTED_IN_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}

LABELS = ("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user")
"""Fields that ask for nothing that could show in an answer; any value is taken."""


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **name}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


Positive = Annotated[int, Meta(ge=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions without the fields that ask for nothing. `model` may be any: one is served."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def chat_body(data: bytes) -> ChatBody:
    """Raises RequestError naming the field when the body is not one that can be answered."""
    fields = _without_neutral(_fields(data), UNSUPPORTED)
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            _without_neutral(message, UNSUPPORTED_IN_MESSAGE, f"messages[{at}].") for at, message in enumerate(messages)
        ]
    if "stream_options" in fields:
        options = fields["stream_options"]
        fields["stream_options"] = _without_neutral(options, UNSUPPORTED_IN_STREAM_OPTIONS, "stream_options.")
    try:
        return msgspec.convert(fields, ChatBody)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), param=_culprit(str(error))) from error


def _fields(data: bytes) -> dict[str, Any]:  # Any: looked at field by field
    """The fields of the body, each decoded alone, so that an error can name it."""
    raw = _decoded(data, dict[str, msgspec.Raw])
    return {name: _decoded(value, Any, name) for name, value in raw.items() if name not in LABELS}


def _decoded(data: bytes | msgspec.Raw, kind: Any, name: str | None = None) -> Any:  # Any: as msgspec's own signature
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "the body is not a JSON object" if name is None else f"{name!r} cannot be read"
        raise RequestError(f"{what}: {error}", param=name) from error


def _without_neutral(fields: Any, table: Neutral, path: str = "") -> Any:  # Any: JSON of any kind, so far
    """The fields that `table` does not name. Raises RequestError for one that it names and that asks for something."""
    if not isinstance(fields, dict):
        return fields
    for name in table.keys() & fields.keys():
        _check_neutral(fields[name], table[name], path + name)
    return {name: value for name, value in fields.items() if name not in table}


def _check_neutral(value: object, neutral: tuple[object, ...], name: str) -> None:
    if value is None or any(type(value) is type(other) and value == other for other in neutral):
        return
    raise RequestError(
        f"{name!r} is not supported by this version of prima",
        param=name,
        code="unsupported_parameter",
        hint=f"leave {name!r} out",
    )


def _culprit(message: str) -> str | None:
    """The field that msgspec complains about: "... unknown field `foo`", "... - at `$.foo[0]`", or both."""
    path = re.search(r" - at `\$\.?(.*)`$", message)
    name = re.search(r"(?:unknown|required) field `(.*?)`(?: - at |$)", message)
    return ".".join(found[1] for found in (path, name) if found and found[1]) or None


def _stops(body: ChatBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def to_request(
    body: ChatBody,
    prompt: list[int],
    context_length: int,
    defaults: Sampling,
    context_shift: bool = False,
    n_keep: int = 0,
) -> Request:
    """The engine's request; wanted tokens are cut to the room that the context has left, unless it shifts.

    Raises RequestError for a prompt longer than the context.
    """
    wanted = body.max_completion_tokens or body.max_tokens
    n_tokens = answer_tokens(wanted, len(prompt), context_length, context_shift)
    if n_tokens < 1 or len(prompt) > context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the context has {context_length}",
            param="messages",
            code="context_length_exceeded",
            hint="shorten the messages, or serve with a longer context (-c)",
        )
    sampling = Sampling(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=defaults.top_k if body.top_k is None else body.top_k,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
    )
    return Request(tuple(prompt), n_tokens, sampling, _stops(body), n_keep=n_keep)


@dataclass(frozen=True, slots=True)
class Reply:
    """Makes the bodies of one answer; `model` is the name that the server tells."""

    model: str
    id: str
    created: int

    @classmethod
    def new(cls, model: str) -> Reply:
        return cls(model, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, text: str, end: Finished) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason.value}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(end)}

    def chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, object]:
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, end: Finished) -> dict[str, object]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(end)}

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(end: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": end.n_prompt,
        "completion_tokens": end.n_generated,
        "total_tokens": end.n_prompt + end.n_generated,
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
