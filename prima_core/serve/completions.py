"""OpenAI's older completion format, a prompt and how it goes on: bodies to requests, answers to bodies. No I/O."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from msgspec import Meta

from prima_core.engine.request import Sampled
from prima_core.errors import RequestError
from prima_core.serve.bodies import Neutral, fields_of, to_struct, unsupported, without_neutral
from prima_core.serve.generation import GenerationBody, check_stream_options
from prima_core.serve.replies import Delta, Heading, Usage, finite
from prima_core.serve.texts import Texts

MAX_PROMPTS = 64
MAX_ALL_CHOICES = 64
MAX_LOGPROBS = 5
DEFAULT_MAX_TOKENS = 16

UNSUPPORTED: Neutral = {"suffix": ("",)}

TokenId = Annotated[int, Meta(ge=0)]
TextOrIds = str | list[int]


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """Body of POST /v1/completions without the fields that ask for nothing."""

    prompt_field: ClassVar[str] = "prompt"

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def n_most(self) -> int | None:
        return self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[TextOrIds]:
        """A text or token ids each. Raises RequestError for ids among prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if ids:
            raise RequestError("a list of prompts holds texts and lists of token ids", param="prompt")
        return [part for part in self.prompt if not isinstance(part, int)]


def completion_body(data: bytes) -> CompletionBody:
    """Raises RequestError naming the field when the body is not one that can be answered."""
    fields = without_neutral(fields_of(data), UNSUPPORTED)
    check_stream_options(fields)
    body = to_struct(fields, CompletionBody)
    if body.best_of not in (None, 1, body.n_choices):  # as many as are wanted: nothing to choose from
        raise unsupported("best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("'echo' with 'logprobs' is not supported: no prompt has them", param="echo")
    n_prompts = len(body.prompts)
    if n_prompts > MAX_PROMPTS:
        raise RequestError(f"{n_prompts} prompts are more than {MAX_PROMPTS}", param="prompt")
    if n_prompts * body.n_choices > MAX_ALL_CHOICES:
        raise RequestError(
            f"{n_prompts} prompts, {body.n_choices} times each, are more than {MAX_ALL_CHOICES}", param="n"
        )
    return body


def encode_prompts(prompts: Sequence[TextOrIds], texts: Texts) -> list[tuple[int, ...]]:
    """Token ids of each. A prompt is the model's whole input, so special tokens may be spelled out in it, as in
    llama-server and vLLM. Raises RequestError for one that is empty or has ids that are none."""
    made = [
        texts.encode(prompt, add_special=True, parse_special=True) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    for ids in made:
        if not ids:
            raise RequestError("a prompt is empty", param="prompt", hint="send at least one token")
        if max(ids) >= texts.vocab_size:
            message = f"token id {max(ids)} is not in [0, {texts.vocab_size})"
            raise RequestError(message, param="prompt")
    return [tuple(ids) for ids in made]


def echoes(body: CompletionBody, texts: Texts) -> list[str]:
    """The text of each choice's prompt where it is to stand before the answer, else nothing."""
    if not body.echo:
        return []
    told = [p if isinstance(p, str) else texts.decode(p, skip_special=False) for p in body.prompts]
    return [text for text in told for _ in range(body.n_choices)]


# ---------------------------------------------------------------- answers


@dataclass(slots=True)
class _Place:
    """Where in a choice's text the next token begins, in characters."""

    texts: Texts
    at: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def pass_over(self, token: int) -> int:
        """Where this token begins."""
        begin = self.at
        if not self.texts.is_silent(token):
            self.at += len(self.decoder.decode(self.texts.token_bytes(token)))
        return begin


class CompletionReply:
    """Makes the bodies of one answer. Of each choice it takes every token once, in order.

    `echoes`: what stands before each choice's text; empty: nothing.
    """

    def __init__(self, heading: Heading, texts: Texts, include_usage: bool = False, echoes: Sequence[str] = ()) -> None:
        self._heading = heading
        self._texts = texts
        self._include_usage = include_usage
        self._echoes = echoes
        self._places: dict[int, _Place] = {}

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, object]:
        before = self._echoes or [""] * len(choices)
        told = [replace(choice, content=text + choice.content) for text, choice in zip(before, choices, strict=True)]
        made = [self._choice(index, choice) for index, choice in enumerate(told)]
        return self._heading.body("text_completion", choices=made, usage=usage.body())

    def opening(self) -> Iterator[dict[str, object]]:
        return (self.chunk(index, Delta(text)) for index, text in enumerate(self._echoes))

    def chunk(self, index: int, delta: Delta) -> dict[str, object]:
        usage = {"usage": None} if self._include_usage else {}
        return self._heading.body("text_completion", choices=[self._choice(index, delta)], **usage)

    def closing(self, usage: Usage) -> Iterator[dict[str, object]]:
        if self._include_usage:
            yield self._heading.body("text_completion", choices=[], usage=usage.body())

    def _choice(self, index: int, delta: Delta) -> dict[str, object]:
        return {
            "index": index,
            "text": delta.content,
            "logprobs": self._logprobs(self._places.setdefault(index, _Place(self._texts)), delta.sampled),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, place: _Place, sampled: Sequence[Sampled]) -> dict[str, object] | None:
        told = [(one, one.logprob) for one in sampled if one.logprob is not None]
        if not told:
            return None
        return {
            "tokens": [self._spelling(one.token) for one, _ in told],
            "token_logprobs": [finite(logprob) for _, logprob in told],
            "top_logprobs": [self._top(((one.token, logprob), *one.top)) for one, logprob in told],
            "text_offset": [place.pass_over(one.token) for one, _ in told],
        }

    def _top(self, likely: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The drawn token and the likeliest ones by falling probability; of two that are spelled alike the likelier."""
        by_text: dict[str, float] = {}
        for token, logprob in sorted(likely, key=lambda one: -one[1]):
            by_text.setdefault(self._spelling(token), finite(logprob))
        return by_text

    def _spelling(self, token: int) -> str:
        """Texts are keys here, so bytes that are no text are spelled out, as OpenAI does it."""
        data = self._texts.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
