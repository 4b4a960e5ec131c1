"""Conversations to token ids through the model's own chat template.

A template is a program out of a downloaded file: it runs in jinja2's sandbox, in a child process that has a memory
limit and is killed when it takes too long (`chat_worker.py`). What messages say never becomes a special token.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prima_core.errors import ClusterError, ConfigError, RequestError, TemplateError
from prima_core.model.chat_process import ChatProcess, DeadChildError, OutOfTimeError
from prima_core.model.chat_worker import MAX_REQUEST_BYTES, MAX_TEXT_CHARACTERS, Reply
from prima_core.model.vocabulary import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from prima_core.model.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""A message as the OpenAI API has it: role, content and what else the template may read. Any: it is JSON."""

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A template may build a special token out of a role ('<|' + role + '|>'), so roles are not free text.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})

# What every template gets from us; a request's own variables must not stand in their place.
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})

_RENDER_S = 2.0  # a large template over a long conversation takes some 30 ms
_QUEUE_S = 30.0
_MEMORY_BYTES = 512 * 1024 * 1024  # of address space; Python with jinja2 takes about 60 MB of it
_NO_CHAT = "give the prompt as text instead: `prima run --raw`, or POST /v1/completions"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model takes it: token ids, and the text that they stand for."""

    ids: list[int]
    text: str


class ChatTemplate:
    """A Jinja chat template and the child process that renders it, which starts with the first conversation.

    Any thread may use it; conversations are rendered one after the other. `close()` ends the child.
    A `source` of None stands for a model without a template: rendering raises.
    """

    def __init__(self, source: str | None, bos: str = "", eos: str = "", *, limit_s: float = _RENDER_S) -> None:
        self.source = source
        self._limit_s = limit_s
        self._setup = {"source": source, "bos": bos, "eos": eos, "memory_bytes": _MEMORY_BYTES}
        self._child: ChatProcess | None = None
        self._turn = threading.Lock()

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, name: str = DEFAULT_TEMPLATE) -> Self:
        """The model's own template of that name, else ChatML where the vocabulary has its tokens, else none.

        Raises ConfigError for a name, other than the default, that the file does not list.
        """
        bos, eos = _spelling(tokenizer, tokenizer.bos_id), _spelling(tokenizer, tokenizer.eos_id)
        if name in tokenizer.chat_templates:
            return cls(tokenizer.chat_templates[name], bos, eos)
        if name != DEFAULT_TEMPLATE:
            known = ", ".join(sorted(tokenizer.chat_templates)) or "none"
            raise ConfigError(f"the model has no chat template {name!r:.80}", hint=f"it has {known}")
        has_chatml = tokenizer.find_special("<|im_start|>") is not None
        return cls(CHATML if has_chatml else None, bos if tokenizer.add_bos else "", eos)

    def knows(self, role: str) -> bool:
        """Whether the template names a role anywhere."""
        return self.source is not None and role in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> str:
        """The conversation as the text that the model was trained on.

        `variables` are the template's own, such as enable_thinking; those that it does not have change nothing.
        Raises TemplateError when the template refuses it, is broken, or asks for too much time, memory or text.
        """
        if self.source is None:
            raise TemplateError("the model has no chat template", hint=_NO_CHAT)
        everything = {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "documents": None,
        }
        # The child's own limit is for when we are no longer there to kill it.
        request = json.dumps({"limit_s": self._limit_s * 2, "variables": everything}).encode()
        if len(request) > MAX_REQUEST_BYTES:
            message = f"the conversation has {len(request)} bytes; {MAX_REQUEST_BYTES} are allowed"
            raise RequestError(message, param="messages")
        letter, text = self._ask(request)
        if letter != Reply.TEXT:
            raise _fault(letter, text)
        return text

    def close(self) -> None:
        """End the child. A later conversation starts another."""
        with self._turn:
            self._end_child()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: bytes) -> tuple[bytes, str]:
        if not self._turn.acquire(timeout=_QUEUE_S):
            message = f"other conversations kept the chat template busy for {_QUEUE_S:g} s"
            raise ClusterError(message, hint="try again later")
        try:
            return self._ask_child(request)
        except OutOfTimeError:
            message = f"the chat template took longer than {self._limit_s:g} s and was ended"
            raise TemplateError(message, hint=_NO_CHAT) from None
        except DeadChildError as error:
            raise TemplateError(f"the process that renders the chat template died: {error}", hint=_NO_CHAT) from None
        finally:
            self._turn.release()

    def _ask_child(self, request: bytes) -> tuple[bytes, str]:
        """A child that was found dead is replaced once: it may have been killed from outside while nobody asked."""
        was_there = self._child is not None
        try:
            return self._living_child().ask(request, self._limit_s)
        except BaseException as error:
            self._end_child()  # also after Ctrl-C: its pipe may hold an answer that the next conversation would get
            if isinstance(error, DeadChildError) and was_there:
                return self._ask_child(request)
            raise

    def _living_child(self) -> ChatProcess:
        if self._child is None:
            self._child = ChatProcess(self._setup)
        return self._child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Message] | None = None,
    variables: Mapping[str, Any] | None = None,  # Any: JSON
) -> ChatPrompt:
    """A conversation as token ids. Special tokens come from the template alone: in messages their spelling is text.

    A template may trim or cut what messages say, so that they cannot be found again in its output. Therefore special
    tokens in messages get a character inside that occurs nowhere; what still reads as special after rendering is the
    template's; then the character is taken out. A conversation without such spellings is encoded as its rendered text.
    No bos is added: templates write it themselves.

    Messages go to the template as they are, with three exceptions: developers speak as the system where the template
    does not know them, no content is an empty text, and the arguments of tool calls are given as objects unless the
    template fails with those.

    Raises TemplateError as `ChatTemplate.render`, RequestError for an unknown role, for a variable that is not the
    request's to set, and for wildly nested messages.
    """
    for message in messages:
        _check_role(message.get("role"))
    _check_variables(variables or {})
    try:
        forms = _forms(messages, template)
        mark = _unused_character(json.dumps([forms, tools, variables, template.source], ensure_ascii=False))

        def render(form: Sequence[Message]) -> str:
            said, offered, own = (_with_texts(part, disarm) for part in (form, tools, variables))
            return template.render(said, add_generation_prompt=add_generation_prompt, tools=offered, variables=own)

        def disarm(text: str) -> str:
            return tokenizer.disarm(text, mark)

        text = _first_that_renders(render, forms)
    except RecursionError:
        raise RequestError("messages or tools are nested too deeply", param="messages") from None
    parts = tokenizer.split_special(text)
    ids = ([part] if isinstance(part, int) else tokenizer.encode(part.replace(mark, "")) for part in parts)
    return ChatPrompt(list(chain.from_iterable(ids)), text.replace(mark, ""))


def n_system_tokens(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    ids: Sequence[int],
    variables: Mapping[str, Any] | None = None,  # Any: JSON
) -> int:
    """How many of the `ids` of a conversation are of the system's messages at its begin; 0 where there are none, and
    where the template wants more than them."""
    system = list(takewhile(lambda message: message.get("role") in ("system", "developer"), messages))
    if not system:
        return 0
    try:
        alone = encode_chat(tokenizer, template, system, add_generation_prompt=False, variables=variables)
    except TemplateError:
        return 0
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone.ids, ids, strict=False)))


def _forms(messages: Sequence[Message], template: ChatTemplate) -> list[Sequence[Message]]:
    """The messages as a template may want them, the likeliest first."""
    spoken = [_with_content(message if template.knows("developer") else _as_system(message)) for message in messages]
    objects = [*map(_with_object_arguments, spoken)]
    return [objects, spoken] if objects != spoken else [spoken]


def _first_that_renders(render: Callable[[Sequence[Message]], str], forms: Sequence[Sequence[Message]]) -> str:
    for form in forms[:-1]:
        try:
            return render(form)
        except TemplateError:
            continue  # some templates write arguments as the text that they are in OpenAI's format
    return render(forms[-1])


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _with_content(message: Message) -> Message:
    """Clients send null beside tool calls; templates then write "None", or search in it and fail."""
    return {**message, "content": ""} if message.get("content") is None else message


def _with_object_arguments(message: Message) -> Message:
    """OpenAI's format has arguments as JSON in a text, most templates want what it says."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [*map(_object_call, calls)]} if isinstance(calls, list) else message


def _object_call(call: Any) -> Any:  # Any: JSON, as a client sent it
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name in variables.keys() & _OURS:
        raise RequestError(f"chat_template_kwargs must not set {name!r}", param="chat_template_kwargs")


def _check_role(role: object) -> None:
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"role {role!r:.80} is not one of {', '.join(sorted(ROLES))}", param="messages")


def _spelling(tokenizer: Tokenizer, id: int | None) -> str:
    return "" if id is None else tokenizer.decode([id], skip_special=False)


def _unused_character(text: str) -> str:
    used = set(text)
    private = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    mark = next((chr(code) for code in private if chr(code) not in used), None)
    if mark is None:
        raise RequestError("the messages use every private character of Unicode", param="messages")
    return mark


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:  # Any: JSON in, JSON out
    """A copy of `value` with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _with_texts(item, change) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_with_texts(item, change) for item in value]
    return value


def _fault(letter: bytes, reason: str) -> TemplateError:
    reason = reason if reason.isprintable() else ascii(reason)[1:-1]
    messages = {
        Reply.REFUSED: (f"the chat template refused the conversation: {reason}", "change the messages as it says"),
        Reply.INVALID: (f"the model's chat template is not valid Jinja: {reason}", _NO_CHAT),
        Reply.FAILED: (f"the chat template failed: {reason}", _NO_CHAT),
        Reply.MEMORY: (f"the chat template asked for more than {_MEMORY_BYTES >> 20} MiB of memory", _NO_CHAT),
        Reply.TOO_LONG: (f"the chat template wrote more than {MAX_TEXT_CHARACTERS} characters", _NO_CHAT),
    }
    message, hint = messages.get(letter, (f"the template process gave an answer that is none: {letter!r}", _NO_CHAT))
    return TemplateError(message, hint=hint)
