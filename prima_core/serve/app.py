"""The HTTP server: OpenAI's chat completions over an engine. Knows HTTP; the format is `openai.py`'s."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from prima_core.engine.request import Event, Failed, Finished, Piece, Request, Sampling
from prima_core.errors import Busy, ClusterError, PrimaError, RequestError, TemplateError
from prima_core.model.chat import ChatPrompt, Message
from prima_core.serve import metrics, openai
from prima_core.serve.guard import Guard, Refusal, read_json_body

log = logging.getLogger(__name__)

T = TypeVar("T")


class Service(metrics.Viewed, Protocol):
    """What the server needs of the head: see `prima_core.node.head.Head`."""

    model_name: str
    created: int
    context_length: int
    context_shift: bool
    sampling: Sampling

    def encode_chat(self, messages: Sequence[Message]) -> ChatPrompt: ...
    def n_keep(self, messages: Sequence[Message], ids: Sequence[int]) -> int: ...
    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int: ...
    def cancel(self, number: int) -> None: ...
    def health(self) -> tuple[bool, dict[str, object]]: ...


def make_app(service: Service, guard: Guard) -> Starlette:
    """The ASGI application. Every error is answered in OpenAI's shape."""
    endpoints = Endpoints(service)
    app = Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            *metrics.routes(service),
        ],
        middleware=[Middleware(Guarded, guard=guard)],
        exception_handlers=dict.fromkeys((HTTPException, ClientDisconnect, PrimaError, Refusal, Exception), _answer),
    )
    app.router.redirect_slashes = False  # a path that is nearly right is an error like any other
    return app


class Guarded:
    """Asks the guard before anything else happens to a request."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        next_app = self._app
        if scope["type"] == "http":
            request = HttpRequest(scope)
            try:
                self._guard.check(request)
            except Refusal as refusal:
                next_app = _answer(request, refusal)
        with suppress(asyncio.CancelledError):  # a request that the end of the server cuts off is no fault to log
            await next_app(scope, receive, send)


class Endpoints:
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
        body = openai.chat_body(await read_json_body(request))
        messages = [message.plain() for message in body.messages]
        prompt = await run_in_threadpool(service.encode_chat, messages)
        n_keep = await run_in_threadpool(service.n_keep, messages, prompt.ids)
        wanted = openai.to_request(
            body, prompt.ids, service.context_length, service.sampling, service.context_shift, n_keep
        )
        reply = openai.Reply.new(service.model_name)
        events = _events(service, wanted)
        if not body.stream:
            text, end = await _unless_gone(request, _collect(events))
            return _json(reply.whole(text, end))
        # A request that cannot run is an error status, not a broken stream: so the first event is awaited here.
        first = await _unless_gone(request, anext(events))
        return EventStream(_chunks(first, events, reply, body), events)


# ---------------------------------------------------------------- a request in the engine, seen from the event loop


async def _events(service: Service, wanted: Request) -> AsyncGenerator[Piece | Finished]:
    """The events of a request, Finished last. Raises the error of a failed one; leaving by any way cancels it."""
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is down, the engine ends its requests
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    number = service.submit(wanted, deliver)
    try:
        while True:
            event = await inbox.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return
    finally:
        service.cancel(number)


async def _collect(events: AsyncGenerator[Piece | Finished]) -> tuple[str, Finished]:
    text: list[str] = []
    async with aclosing(events):
        async for event in events:
            text.append(event.text)
            if isinstance(event, Finished):
                return "".join(text), event
    raise ClusterError("the answer ended early", hint="ask again")


class ClientGone(PrimaError):
    """Nobody is there to read the answer."""


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
    """An answer that is sent while it is made. However the sending ends, the request in the engine ends with it."""

    def __init__(self, chunks: AsyncIterator[bytes], events: AsyncGenerator[Piece | Finished]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # cancels the chunks when the client hangs up
        finally:
            await self._events.aclose()


async def _chunks(
    first: Piece | Finished, events: AsyncIterator[Piece | Finished], reply: openai.Reply, body: openai.ChatBody
) -> AsyncIterator[bytes]:
    yield _sse(reply.chunk({"role": "assistant", "content": ""}))
    for data in _chunk_bodies(first, reply, body):
        yield _sse(data)
    try:
        async for event in events:
            for data in _chunk_bodies(event, reply, body):
                yield _sse(data)
    except PrimaError as error:
        yield _sse(_error_fields(error)[1])
    yield b"data: [DONE]\n\n"


def _chunk_bodies(event: Piece | Finished, reply: openai.Reply, body: openai.ChatBody) -> Iterator[dict[str, object]]:
    if event.text:
        yield reply.chunk({"content": event.text})
    if isinstance(event, Finished):
        yield reply.chunk({}, event.reason.value)
        if body.include_usage:
            yield reply.usage_chunk(event)


def _sse(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


# ---------------------------------------------------------------- answers


def _json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _answer(request: HttpRequest, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    if isinstance(error, HTTPException):  # of the router
        message = f"{request.method} {request.scope['path']} is not known here"
        code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
        headers = dict(error.headers or {})  # Allow
        return _json(openai.error_body(message, "invalid_request_error", code=code), error.status_code, headers)
    status, body = _error_fields(error)
    return _json(body, status, _ERROR_HEADERS.get(status))


_ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}


def _error_fields(error: Exception) -> tuple[int, dict[str, object]]:
    """Whose fault it is decides the status: the request's 4xx, the cluster's 503, ours 500."""
    match error:
        case Refusal(status=401):
            return 401, openai.error_body(error.message, "authentication_error", code=error.code)
        case Refusal():
            return error.status, openai.error_body(error.message, "invalid_request_error", code=error.code)
        case RequestError():
            return 400, openai.error_body(str(error), "invalid_request_error", error.param, error.code)
        case TemplateError():
            return 400, openai.error_body(str(error), "invalid_request_error", "messages", "template_failed")
        case ClientGone() | ClientDisconnect():
            return 499, openai.error_body("the client has gone", "invalid_request_error", code="client_gone")
        case Busy():
            return 503, openai.error_body(str(error), "service_unavailable", code="server_busy")
        case ClusterError():
            return 503, openai.error_body(str(error), "service_unavailable", code="cluster_not_ready")
        case PrimaError():
            log.error("a request failed: %s", error)
            return 500, openai.error_body(str(error), "server_error")
        case _:  # the server logs it with its traceback
            return 500, openai.error_body(f"the server failed: {type(error).__name__}", "server_error")
