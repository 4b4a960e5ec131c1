"""An engine that answers as told, and a client of an application in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from starlette.testclient import TestClient

from prima_core.engine.facts import EngineFacts
from prima_core.engine.reasoning import ReasoningStream
from prima_core.engine.request import Event, Finished, FinishReason, Piece, Request, Sampled, Sampling
from prima_core.model.chat import ChatPrompt, Message
from prima_core.model.reasoning import ReasoningTags
from prima_core.node.driver import State
from prima_core.node.view import RequestTotals, ServerView
from prima_core.serve.app import make_app
from prima_core.serve.guard import Guard

HELLO: tuple[Piece | Finished, ...] = (
    *(Piece(text, Sampled(token)) for text, token in (("Hel", 1), ("", 2), ("lo", 3))),
    Finished(FinishReason.STOP, "!", n_prompt=2, n_generated=3),
)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "two words"}]}  # Any: JSON


class FakeTexts:
    """A word is a token; token 7 is special, 128 and more are the bytes of their number."""

    vocab_size = 256
    bos_id = 0
    eos_id = 7

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        words = range(1, len(text.split()) + 1)
        return [*([0] if add_special else []), *words, *([7] if parse_special and "<end>" in text else [])]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        shown = (id for id in ids if not (skip_special and self.is_silent(id)))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id >= 128 else b"<end>" if id == 7 else f"w{id}".encode()

    def is_silent(self, id: int) -> bool:
        return id == 7


class FakeService:
    """Delivers `script` to every request at once."""

    model_name = "fake"
    created = 1_700_000_000
    fingerprint = "fp_1"
    model_facts = MappingProxyType({"n_params": 5, "size": 6})
    model_file = "fake.gguf"
    chat_template = "a template"
    facts = EngineFacts()
    reasoning_tags: ReasoningTags | None = None
    tokenizer = FakeTexts()
    context_length = 10
    context_shift = False
    sampling = Sampling(temperature=0.5, top_k=7, top_p=0.9)
    totals = RequestTotals()

    def __init__(self, script: Sequence[Event] = HELLO) -> None:
        self.script = script
        self.conversations: list[Sequence[Message]] = []
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.ok = True

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> ChatPrompt:
        self.conversations.append(messages)
        self.variables = variables
        words = " ".join(message["content"] for message in messages)
        return ChatPrompt(list(range(len(words.split()))), words)

    def n_keep(
        self, messages: Sequence[Message], ids: Sequence[int], *, variables: Mapping[str, Any] | None = None
    ) -> int:
        return 0

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        self.requests.append(request)
        for event in self.script:
            deliver(event)
        return len(self.requests)

    def reasoning_stream(self, prompt: ChatPrompt) -> ReasoningStream:
        return ReasoningStream(self.reasoning_tags)

    def engine_facts(self) -> EngineFacts:
        return self.facts

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def health(self) -> tuple[bool, dict[str, object]]:
        return self.ok, {"status": "ok" if self.ok else "waiting"}

    def view(self) -> ServerView:
        return ServerView("fake", "0", State.SERVING, "", 10, 1, 2, 30, 40, ())


def client_of(service: FakeService, guard: Guard | None = None) -> TestClient:
    app = make_app(service, guard or Guard("127.0.0.1"))
    return TestClient(app, base_url="http://127.0.0.1:7746", raise_server_exceptions=False)
