"""OpenAI's chat completion format: bodies to messages and requests, answers to bodies. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from prima_core.engine.engine import MAX_LOGPROBS
from prima_core.engine.request import Sampled
from prima_core.errors import RequestError
from prima_core.serve.bodies import Neutral, fields_of, to_struct, without_neutral
from prima_core.serve.generation import GenerationBody, Positive, check_stream_options
from prima_core.serve.replies import Delta, Heading, Usage, finite
from prima_core.serve.texts import Texts

MAX_MESSAGES = 4096
MAX_TOOL_CALLS = 128

UNSUPPORTED: Neutral = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
UNSUPPORTED_IN_MESSAGE: Neutral = {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}
"""An answer's message comes back as part of the next request, with the fields that were empty in it."""

# ---------------------------------------------------------------- messages


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


Content = str | list[TextPart]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`index` is its place in a stream, which some clients send back."""

    id: str
    function: Function
    type: Literal["function"] = "function"
    index: int | None = None

    def plain(self) -> dict[str, Any]:  # Any: JSON
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="role"):
    """`plain` is the message as chat templates take it."""

    role: ClassVar[str]
    content: Content
    name: str | None = None

    def plain(self) -> dict[str, Any]:  # Any: JSON
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": _text(self.content), **name}


class SystemMessage(_Message, frozen=True, tag="system"):
    role = "system"


class DeveloperMessage(_Message, frozen=True, tag="developer"):
    role = "developer"


class UserMessage(_Message, frozen=True, tag="user"):
    role = "user"


class AssistantMessage(_Message, frozen=True, kw_only=True, tag="assistant"):
    role = "assistant"
    content: Content = ""
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOL_CALLS)] = []
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:  # Any: JSON
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        thoughts = {"reasoning_content": self.reasoning_content} if self.reasoning_content else {}
        return {**_Message.plain(self), **calls, **thoughts}


class ToolMessage(_Message, frozen=True, kw_only=True, tag="tool"):
    role = "tool"
    tool_call_id: str

    def plain(self) -> dict[str, Any]:  # Any: JSON
        return {**_Message.plain(self), "tool_call_id": self.tool_call_id}


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# ---------------------------------------------------------------- bodies


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions without the fields that ask for nothing."""

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Positive | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # Any: the template's own variables
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def n_most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def chat_body(data: bytes) -> ChatBody:
    """Raises RequestError naming the field when the body is not one that can be answered."""
    fields = without_neutral(fields_of(data), UNSUPPORTED)
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_message_fields(message, f"messages[{at}].") for at, message in enumerate(messages)]
    check_stream_options(fields)
    body = to_struct(fields, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs asks for logprobs: true", param="top_logprobs")
    return body


def _message_fields(message: Any, path: str) -> Any:  # Any: JSON
    """Without what asks for nothing; an assistant's content may be null, as when it only called tools."""
    fields = without_neutral(message, UNSUPPORTED_IN_MESSAGE, path)
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if value is not None and not _is_empty_call(name, value)}


def _is_empty_call(name: str, value: object) -> bool:
    return name == "tool_calls" and value == []


# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class ChatReply:
    """Makes the bodies of one answer."""

    heading: Heading
    texts: Texts
    n_choices: int = 1
    include_usage: bool = False

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, object]:
        made = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.content, "refusal": None, **_reasoning(choice)},
                "logprobs": self._logprobs(choice.sampled),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return self.heading.body("chat.completion", choices=made, usage=usage.body())

    def opening(self) -> Iterator[dict[str, object]]:
        for index in range(self.n_choices):
            yield self._chunk(index, {"role": "assistant", "content": ""}, Delta())

    def chunk(self, index: int, delta: Delta) -> dict[str, object]:
        has_content = delta.content or (delta.sampled and not delta.reasoning)
        content = {"content": delta.content} if has_content else {}
        return self._chunk(index, {**_reasoning(delta), **content}, delta)

    def closing(self, usage: Usage) -> Iterator[dict[str, object]]:
        if self.include_usage:
            yield self.heading.body("chat.completion.chunk", choices=[], usage=usage.body())

    def _chunk(self, index: int, told: dict[str, str], delta: Delta) -> dict[str, object]:
        choice = {
            "index": index,
            "delta": told,
            "logprobs": self._logprobs(delta.sampled),
            "finish_reason": delta.finish_reason,
        }
        usage = {"usage": None} if self.include_usage else {}
        return self.heading.body("chat.completion.chunk", choices=[choice], **usage)

    def _logprobs(self, sampled: Sequence[Sampled]) -> dict[str, object] | None:
        entries = [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*other) for other in one.top]}
            for one in sampled
            if one.logprob is not None
        ]
        return {"content": entries, "refusal": None} if entries else None

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        data = self.texts.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


def _reasoning(delta: Delta) -> dict[str, str]:
    """No field of OpenAI's: DeepSeek's name for it, which llama-server and vLLM use as well."""
    return {"reasoning_content": delta.reasoning} if delta.reasoning else {}
