"""The HTTP server: OpenAI's chat completions over an engine. Knows HTTP; the format is `openai.py`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from prima_core.engine.request import Event, Failed, Finished, Piece, Request, Sampling
from prima_core.errors import ClusterError, PrimaError, RequestError, TemplateError
from prima_core.serve import openai
from prima_core.serve.guard import Guard, Refusal, read_body

log = logging.getLogger(__name__)


class Service(Protocol):
    """What the server needs of the head: see `prima_core.node.head.Head`."""

    model_name: str
    created: int
    context_length: int
    sampling: Sampling

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]: ...
    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int: ...
    def cancel(self, number: int) -> None: ...
    def health(self) -> tuple[bool, dict[str, object]]: ...


Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def make_app(service: Service, guard: Guard) -> Starlette:
    """The ASGI application. Every error is answered in OpenAI's shape."""
    routes = Routes(service)
    table: tuple[tuple[str, str, Endpoint], ...] = (
        ("GET", "/health", routes.health),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("POST", "/v1/chat/completions", routes.chat),
    )
    known = [Route(path, _guarded(endpoint, guard), methods=[method]) for method, path, endpoint in table]
    every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return Starlette(routes=[*known, Route("/{path:path}", _guarded(_unknown, guard), methods=every)])


def _guarded(endpoint: Endpoint, guard: Guard) -> Endpoint:
    """The endpoint behind the guard, with every error turned into an answer."""

    async def answer(request: HttpRequest) -> Response:
        try:
            guard.check(request)
            return await endpoint(request)
        except Refusal as refusal:
            kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
            return _json(openai.error_body(refusal.message, kind, code=refusal.code), refusal.status)
        except PrimaError as error:
            return _error_response(error)

    return answer


async def _unknown(request: HttpRequest) -> Response:
    message = f"{request.method} {request.url.path} is not known here"
    return _json(openai.error_body(message, "invalid_request_error", code="unknown_url"), 404)


class Routes:
    """The endpoints of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: HttpRequest) -> Response:
        ok, facts = self._service.health()
        return _json(facts, 200 if ok else 503)

    async def models(self, request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._service.model_name:
            message = f"model {name!r} is not served here, {self._service.model_name!r} is"
            return _json(openai.error_body(message, "invalid_request_error", "model", "model_not_found"), 404)
        return _json(self._model())

    def _model(self) -> dict[str, object]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "prima",
        }

    async def chat(self, request: HttpRequest) -> Response:
        service = self._service
        body = openai.chat_body(await read_body(request))
        prompt = await run_in_threadpool(service.encode_chat, [message.plain() for message in body.messages])
        wanted = openai.to_request(body, prompt, service.context_length, service.sampling)
        reply = openai.Reply.new(service.model_name)
        generation = Generation(service, wanted)
        first = await generation.first(request)
        if body.stream:
            return StreamingResponse(_stream(generation, first, reply, body), media_type="text/event-stream")
        return await _whole(generation, first, reply, request)


class Generation:
    """One request in the engine, seen from the event loop. Leaving it by any way cancels what still runs."""

    def __init__(self, service: Service, request: Request) -> None:
        self._service = service
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            if not loop.is_closed():  # the server may be going down while the engine ends its requests
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._number = service.submit(request, deliver)

    def cancel(self) -> None:
        self._service.cancel(self._number)

    async def first(self, request: HttpRequest) -> Event:
        """The first event, so that a request that cannot run is an error status and not a broken stream."""
        event = await self._next_or_gone(request)
        if isinstance(event, Failed):
            raise event.error
        return event

    async def _next_or_gone(self, request: HttpRequest) -> Event:
        """The next event; ClientGone when the client hangs up before it comes."""
        event = asyncio.ensure_future(self._events.get())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            raise ClientGone("the client has gone")
        except BaseException:
            self.cancel()
            raise
        finally:
            event.cancel()
            gone.cancel()

    async def rest(self, first: Event, request: HttpRequest | None = None) -> AsyncGenerator[Event]:
        """`first` and all that follow; ends behind Finished or Failed. With `request`, watches for a hang-up."""
        event = first
        try:
            while True:
                yield event
                if not isinstance(event, Piece):
                    return
                event = await (self._events.get() if request is None else self._next_or_gone(request))
        finally:
            self.cancel()


class ClientGone(PrimaError):
    """Nobody is there to read the answer."""


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(generation: Generation, first: Event, reply: openai.Reply, request: HttpRequest) -> Response:
    text: list[str] = []
    async with aclosing(generation.rest(first, request)) as events:
        async for event in events:
            if isinstance(event, Failed):
                raise event.error
            text.append(event.text)
            if isinstance(event, Finished):
                return _json(reply.whole("".join(text), event))
    raise ClusterError("the answer ended early", hint="ask again")


async def _stream(
    generation: Generation, first: Event, reply: openai.Reply, body: openai.ChatBody
) -> AsyncIterator[bytes]:
    """Server-sent events. A hang-up of the client cancels this generator, which cancels the request."""
    yield _event(reply.chunk({"role": "assistant", "content": ""}))
    async with aclosing(generation.rest(first)) as events:
        async for event in events:
            for data in _stream_bodies(event, reply, body):
                yield _event(data)
    yield b"data: [DONE]\n\n"


def _stream_bodies(event: Event, reply: openai.Reply, body: openai.ChatBody) -> Iterator[dict[str, object]]:
    if isinstance(event, Failed):
        yield _error_fields(event.error)[1]
        return
    if event.text:
        yield reply.chunk({"content": event.text})
    if isinstance(event, Finished):
        yield reply.chunk({}, event.reason.value)
        if body.include_usage:
            yield reply.usage_chunk(event)


def _event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _error_response(error: PrimaError) -> Response:
    status, body = _error_fields(error)
    return _json(body, status, {"Retry-After": "2"} if status == 503 else None)


def _error_fields(error: PrimaError) -> tuple[int, dict[str, object]]:
    """Whose fault it is decides the status: the request's 400, the cluster's 503, ours 500."""
    match error:
        case RequestError():
            return 400, openai.error_body(str(error), "invalid_request_error", error.param, error.code)
        case TemplateError():
            return 400, openai.error_body(str(error), "invalid_request_error", "messages", "template_failed")
        case ClientGone():
            return 499, openai.error_body(str(error), "invalid_request_error", code="client_gone")
        case ClusterError():
            return 503, openai.error_body(str(error), "service_unavailable", code="cluster_not_ready")
        case _:
            log.error("a request failed: %s", error)
            return 500, openai.error_body(str(error), "internal_error")
