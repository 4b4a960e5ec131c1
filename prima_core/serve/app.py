"""The HTTP server: OpenAI's API and some of llama-server's over an engine. Knows HTTP; the formats are others'."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, ParamSpec, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from prima_core.engine.reasoning import ReasoningStream
from prima_core.engine.request import Event, Request
from prima_core.errors import Busy, PrimaError
from prima_core.model.chat import ChatPrompt, Message
from prima_core.serve import llama_server, metrics
from prima_core.serve.answers import Asked, Reply, answer
from prima_core.serve.chat import ChatReply, chat_body
from prima_core.serve.completions import CompletionReply, completion_body, echoes, encode_prompts
from prima_core.serve.errors import error_body, error_fields
from prima_core.serve.generation import GenerationBody, Prompt, Served, to_requests
from prima_core.serve.guard import Guard, Refusal, read_json_body
from prima_core.serve.replies import Heading

P = ParamSpec("P")
T = TypeVar("T")

MAX_TEXTS = 2
"""So many texts are read at a time: each takes up to a hundred bytes of memory for every one of its own."""


class Service(llama_server.Served, metrics.Viewed, Protocol):
    """What the server needs of the head: see `prima_core.node.head.Head`."""

    model_name: str
    created: int
    context_shift: bool

    @property
    def fingerprint(self) -> str: ...
    @property
    def model_facts(self) -> Mapping[str, int]: ...

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> ChatPrompt: ...
    def n_keep(
        self,
        messages: Sequence[Message],
        ids: Sequence[int],
        *,
        variables: Mapping[str, Any] | None = None,  # Any: JSON
    ) -> int: ...
    def reasoning_stream(self, prompt: ChatPrompt) -> ReasoningStream: ...
    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int: ...
    def cancel(self, number: int) -> None: ...
    def health(self) -> tuple[bool, dict[str, object]]: ...


def make_app(service: Service, guard: Guard) -> Starlette:
    """The ASGI application. Every error is answered in OpenAI's shape."""
    endpoints = Endpoints(service)
    app = Starlette(
        routes=[
            Route("/health", endpoints.health),
            *(Route(path, endpoints.models) for path in ("/v1/models", "/models")),
            Route("/v1/models/{name:path}", endpoints.model),
            *(Route(path, endpoints.chat, methods=["POST"]) for path in ("/v1/chat/completions", "/chat/completions")),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/props", endpoints.props),
            Route("/slots", endpoints.slots),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/detokenize", endpoints.detokenize, methods=["POST"]),
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
        self._texts = asyncio.Semaphore(MAX_TEXTS)

    async def _on_text(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run what reads or makes texts of any length beside the event loop, a few at a time."""
        async with self._texts:
            return await run_in_threadpool(work, *arguments, **named)

    async def health(self, request: HttpRequest) -> Response:
        ok, facts = self._service.health()
        return _json(facts, 200 if ok else 503)

    async def models(self, request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._service.model_name:
            message = f"model {name!r} is not served here, {self._service.model_name!r} is"
            return _json(error_body(message, "invalid_request_error", "model", "model_not_found"), 404)
        return _json(self._model())

    def _model(self) -> dict[str, object]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "prima",
            "meta": {**self._service.model_facts, "n_ctx": self._service.context_length},
        }

    async def chat(self, request: HttpRequest) -> Response:
        service = self._service
        body = chat_body(await read_json_body(request))
        messages = [message.plain() for message in body.messages]
        variables = body.chat_template_kwargs
        prompt = await self._on_text(service.encode_chat, messages, variables=variables)
        n_keep = await self._on_text(service.n_keep, messages, prompt.ids, variables=variables)
        heading = Heading.new("chatcmpl", service.model_name, service.fingerprint)
        reply = ChatReply(heading, service.tokenizer, body.n_choices, body.include_usage)
        reasoning = partial(service.reasoning_stream, prompt)
        return await answer(request, service, self._asked(body, [Prompt(tuple(prompt.ids), n_keep)], reply, reasoning))

    async def completions(self, request: HttpRequest) -> Response:
        service = self._service
        body = completion_body(await read_json_body(request))
        prompts = [Prompt(ids) for ids in await self._on_text(encode_prompts, body.prompts, service.tokenizer)]
        heading = Heading.new("cmpl", service.model_name, service.fingerprint)
        reply = CompletionReply(heading, service.tokenizer, body.include_usage, echoes(body, service.tokenizer))
        return await answer(request, service, self._asked(body, prompts, reply, partial(ReasoningStream, None)))

    def _asked(
        self,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        reply: Reply,
        reasoning: Callable[[], ReasoningStream],
    ) -> Asked:
        service = self._service
        served = Served(service.context_length, service.context_shift, service.tokenizer.vocab_size, service.sampling)
        return Asked(to_requests(body, prompts, served), body.n_choices, reply, reasoning, bool(body.stream))

    async def props(self, request: HttpRequest) -> Response:
        return _json(llama_server.props(self._service, f"prima-{version('prima-llm')}"))

    async def slots(self, request: HttpRequest) -> Response:
        made = llama_server.slots(self._service)
        if request.query_params.get("fail_on_no_slot") and all(slot["is_processing"] for slot in made):
            return _answer(request, Busy("no slot is free", hint="try again later"))
        return _json(made)

    async def tokenize(self, request: HttpRequest) -> Response:
        data = await read_json_body(request)
        return _json(await self._on_text(llama_server.tokenize, data, self._service.tokenizer))

    async def detokenize(self, request: HttpRequest) -> Response:
        data = await read_json_body(request)
        return _json(await self._on_text(llama_server.detokenize, data, self._service.tokenizer))


# ---------------------------------------------------------------- answers


def _json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _answer(request: HttpRequest, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    if isinstance(error, HTTPException):  # of the router
        message = f"{request.method} {request.scope['path']} is not known here"
        code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
        headers = dict(error.headers or {})  # Allow
        return _json(error_body(message, "invalid_request_error", code=code), error.status_code, headers)
    status, body = error_fields(error)
    return _json(body, status, _ERROR_HEADERS.get(status))


_ERROR_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}
