"""Requests in the engine, seen from the event loop, and their answers, whole or streamed as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from prima_core.engine.reasoning import Part, PartKind, ReasoningStream
from prima_core.engine.request import Event, Failed, Finished, Piece, Request
from prima_core.errors import PrimaError
from prima_core.serve.errors import ClientGone, error_fields
from prima_core.serve.replies import Delta, Usage, joined

T = TypeVar("T")


class Submitter(Protocol):
    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int: ...
    def cancel(self, number: int) -> None: ...


class Reply(Protocol):
    """Makes the bodies of an answer in one format."""

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, object]: ...

    def opening(self) -> Iterator[dict[str, object]]:
        """What a stream begins with."""
        ...

    def chunk(self, index: int, delta: Delta) -> dict[str, object]: ...

    def closing(self, usage: Usage) -> Iterator[dict[str, object]]:
        """What a stream ends with."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What one HTTP request wants of the engine: `n_choices` requests for each prompt, in order, and how it is told.

    `reasoning` makes what cuts the text of one answer into reasoning and content.
    """

    requests: Sequence[Request]
    n_choices: int
    reply: Reply
    reasoning: Callable[[], ReasoningStream]
    stream: bool = False


Numbered = tuple[int, Piece | Finished]


async def answer(http: HttpRequest, service: Submitter, asked: Asked) -> Response:
    """Raises the error of a request that failed before anything was sent, ClientGone when nobody waits any more."""
    events = _events(service, asked.requests)
    if not asked.stream:
        body = await _unless_gone(http, _whole(events, asked))
        return Response(msgspec.json.encode(body), media_type="application/json")
    # A request that cannot run is an error status, not a broken stream: so the first event is awaited here.
    first = await _unless_gone(http, anext(events))
    return EventStream(_chunks(first, events, asked), events)


async def _events(service: Submitter, requests: Sequence[Request]) -> AsyncGenerator[Numbered]:
    """The events of all requests as they come, each with its request's index; of each request Finished is the last.

    Raises the error of the first that fails; leaving by any way cancels all.
    """
    inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is down, the engine ends its requests
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))

    numbers: list[int] = []
    try:
        for index, request in enumerate(requests):
            numbers.append(service.submit(request, partial(deliver, index)))
        n_left = len(requests)
        while n_left:
            index, event = await inbox.get()
            if isinstance(event, Failed):
                raise event.error
            n_left -= isinstance(event, Finished)
            yield index, event
    finally:
        for number in numbers:
            service.cancel(number)


@dataclass(slots=True)
class _Choice:
    """One request's answer as it comes."""

    reasoning: ReasoningStream
    end: Finished | None = None
    n_before_content: int = 0
    has_content: bool = False
    has_reasoned: bool = False

    @property
    def n_reasoning(self) -> int:
        """Tokens of the reasoning, its tags among them."""
        return self.n_before_content if self.has_reasoned else 0

    def deltas(self, event: Piece | Finished) -> Iterator[Delta]:
        """What the event adds to the answer. A token without text counts where its logarithm is to be told."""
        if isinstance(event, Finished):
            self.end = event
            yield from self._told([*self.reasoning.push(event.text), *self.reasoning.flush()])
            yield Delta(finish_reason=event.reason.value)
            return
        first, *rest = self._told(self.reasoning.push(event.text)) or [Delta()]
        self.n_before_content += not self.has_content
        if first != Delta() or event.sampled.logprob is not None:
            yield replace(first, sampled=(event.sampled,))
        yield from rest

    def _told(self, parts: Sequence[Part]) -> list[Delta]:
        kinds = {part.kind for part in parts}
        self.has_content |= PartKind.CONTENT in kinds
        self.has_reasoned |= PartKind.REASONING in kinds
        return [Delta(part.text) if part.kind is PartKind.CONTENT else Delta(reasoning=part.text) for part in parts]


class _Choices:
    """The answers of all requests of an HTTP request."""

    def __init__(self, asked: Asked) -> None:
        self._n_choices = asked.n_choices
        self._all = [_Choice(asked.reasoning()) for _ in asked.requests]

    def deltas(self, index: int, event: Piece | Finished) -> Iterator[Delta]:
        return self._all[index].deltas(event)

    @property
    def usage(self) -> Usage:
        """Once all have ended."""
        ends = [choice.end for choice in self._all if choice.end is not None]
        return Usage.of(ends, self._n_choices, sum(choice.n_reasoning for choice in self._all))


async def _whole(events: AsyncGenerator[Numbered], asked: Asked) -> dict[str, object]:
    choices = _Choices(asked)
    deltas: list[list[Delta]] = [[] for _ in asked.requests]
    async with aclosing(events):
        async for index, event in events:
            deltas[index].extend(choices.deltas(index, event))
    return asked.reply.whole([joined(parts) for parts in deltas], choices.usage)


async def _unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
    """What `work` gives. Cancels it and raises ClientGone when the client hangs up before that."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone("the client has gone")
        return job.result()
    finally:
        gone.cancel()
        job.cancel()


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------- server-sent events


class EventStream(StreamingResponse):
    """An answer that is sent while it is made. However the sending ends, the requests in the engine end with it."""

    def __init__(self, chunks: AsyncIterator[bytes], events: AsyncGenerator[Numbered]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # cancels the chunks when the client hangs up
        finally:
            await self._events.aclose()


async def _chunks(first: Numbered, events: AsyncIterator[Numbered], asked: Asked) -> AsyncIterator[bytes]:
    reply, choices = asked.reply, _Choices(asked)
    for body in reply.opening():
        yield _sse(body)
    for delta in choices.deltas(*first):
        yield _sse(reply.chunk(first[0], delta))
    try:
        async for index, event in events:
            for delta in choices.deltas(index, event):
                yield _sse(reply.chunk(index, delta))
        for body in reply.closing(choices.usage):
            yield _sse(body)
    except PrimaError as error:
        yield _sse(error_fields(error)[1])
    yield b"data: [DONE]\n\n"


def _sse(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
