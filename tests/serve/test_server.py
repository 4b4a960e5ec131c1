"""The server with a real head: over sockets, by the clients that people use."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from prima_core.commands.serve import bound
from prima_core.engine.request import Event, FinishReason, Piece, Request
from prima_core.node.head import HeadOptions
from prima_core.serve.guard import Guard
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.serve.live import Tireless, client_at, serving, started, until

CONTEXT = 20_000  # more tokens than are generated while a test runs
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TinyModel(context_length=CONTEXT))


@pytest.fixture(scope="module")
def head(model: Path) -> Iterator[Tireless]:
    with started(Tireless, model, HeadOptions(context=CONTEXT, parallel=1)) as head:
        head.wait_until_serving()
        yield head


@pytest.fixture(scope="module")
def url(head: Tireless) -> Iterator[str]:
    with serving(head) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_at(url) as client:
        yield client


def user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


def ask(client: openai.OpenAI, text: str = "hello", **wishes: Any) -> str:  # Any: any parameter of the API
    wishes = {"max_tokens": 12, "temperature": 0, **wishes}
    reply = client.chat.completions.create(model="tiny", messages=[user(text)], **wishes)
    return reply.choices[0].message.content or ""


def stream(client: openai.OpenAI, text: str = "hello", **wishes: Any) -> Iterator[str]:
    wishes = {"max_tokens": 12, "temperature": 0, **wishes}
    with client.chat.completions.create(model="tiny", messages=[user(text)], stream=True, **wishes) as chunks:
        for chunk in chunks:
            yield chunk.choices[0].delta.content or ""


# ---------------------------------------------------------------- the openai client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "prima"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_a_chat_is_answered_and_its_tokens_are_counted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="any", messages=[user("hello")], max_tokens=5, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5
    assert reply.usage.prompt_tokens > 1
    assert reply.model == "tiny"


def test_a_stream_brings_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    pieces = list(stream(client))
    assert len(pieces) > 5
    assert "".join(pieces) == ask(client)


def test_a_stream_ends_with_its_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[user("hello")],
            max_tokens=5,
            stream=True,
            stream_options=options,  # type: ignore[call-overload]  # a plain dict
        )
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 5


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [user("hello")]  # Any: the client takes its own answers as messages
    for text in ("more", "and more"):
        reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
        messages += [reply.choices[0].message, user(text)]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=5).choices[0].message.content


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, store=True)
    assert (error.value.param, error.value.code) == ("store", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match=rf"has \d{{5,}} tokens, the context has {CONTEXT}"):
        ask(client, "far too long " * CONTEXT)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, temperature=-1)
    assert error.value.param == "temperature"


def test_the_api_key_is_asked_for(head: Tireless) -> None:
    with serving(head, Guard("127.0.0.1", "s3cret")) as url:
        with client_at(url, "s3cret") as client:
            assert ask(client)
        with client_at(url, "guess") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            ask(client)
        assert httpx.get(f"{url}/health").status_code == 200


# ---------------------------------------------------------------- sockets


def test_small_parts_of_an_answer_are_sent_at_once() -> None:
    """Nagle's algorithm would hold each back until the one before is acknowledged, which takes 40 ms."""

    async def go(listener: socket.socket) -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Asked(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                told.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        async with await asyncio.get_running_loop().create_server(Asked, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await asyncio.wait_for(told, timeout=10)

    with bound("127.0.0.1", 0) as listener:
        assert asyncio.run(go(listener)) == 1


# ---------------------------------------------------------------- sampling


def test_a_seed_makes_an_answer_repeatable(client: openai.OpenAI) -> None:
    first, second = (ask(client, temperature=1.5, top_p=1, seed=5) for _ in range(2))
    assert first == second
    assert first != ask(client, temperature=1.5, top_p=1, seed=6)
    assert first == "".join(stream(client, temperature=1.5, top_p=1, seed=5))


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    assert len({ask(client, temperature=2, top_p=1, extra_body={"top_k": 0}) for _ in range(4)}) > 1


def test_temperature_zero_top_k_one_and_top_p_zero_are_the_likeliest_token(client: openai.OpenAI) -> None:
    likeliest = ask(client)
    assert ask(client, temperature=2, extra_body={"top_k": 1}) == likeliest
    assert ask(client, temperature=2, top_p=0) == likeliest


def test_stop_strings_end_the_text_wherever_tokens_end(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=30)
    stop = text[9:13]
    expected = text[: text.index(stop)]
    assert ask(client, max_tokens=30, stop=stop) == expected
    assert "".join(stream(client, max_tokens=30, stop=["not there", stop])) == expected


# ---------------------------------------------------------------- many at once


def test_requests_at_the_same_time_are_answered_as_if_alone(client: openai.OpenAI) -> None:
    texts = [f"question {number} " * number for number in range(1, 9)]
    alone = [ask(client, text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: "".join(stream(client, text)), texts))
    assert together == alone


@contextmanager
def full(head: Tireless) -> Iterator[None]:
    """Something runs that leaves no KV room for others, until the end of the block."""
    events: SimpleQueue[Event] = SimpleQueue()
    number = head.submit(Request((1, 2, 3), CONTEXT - 2), events.put)
    assert isinstance(events.get(timeout=20), Piece)
    try:
        yield
    finally:
        head.cancel(number)


def test_what_does_not_fit_the_kv_budget_waits(head: Tireless, client: openai.OpenAI) -> None:
    alone = ask(client)
    with ThreadPoolExecutor(1) as pool:
        with full(head):
            waiting = pool.submit(ask, client)
            until(lambda: head.load == (1, 1))
            assert not waiting.done()
        assert waiting.result(timeout=20) == alone


# ---------------------------------------------------------------- clients that go away


def test_leaving_in_the_middle_of_a_stream_stops_the_generation(head: Tireless, client: openai.OpenAI) -> None:
    head.forget_ends()
    pieces = stream(client, max_tokens=None)
    assert [next(pieces) for _ in range(5)]
    assert head.load == (1, 0)
    pieces.close()  # type: ignore[attr-defined]  # it is a generator
    assert head.ends.get(timeout=20) is FinishReason.CANCELLED
    assert head.load == (0, 0)


def test_leaving_while_a_whole_answer_is_made_stops_the_generation(head: Tireless, url: str) -> None:
    head.forget_ends()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}{CHAT}", json={"messages": [user("hello")], "temperature": 0}, timeout=0.5)
    assert head.ends.get(timeout=20) is FinishReason.CANCELLED
    assert head.load == (0, 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_leaving_before_the_first_token_gives_the_place_up(head: Tireless, url: str, streamed: bool) -> None:
    head.forget_ends()
    with full(head):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{CHAT}", json={"messages": [user("hello")], "stream": streamed}, timeout=0.5)
        assert head.ends.get(timeout=20) is FinishReason.CANCELLED
        assert head.load == (1, 0)


# ---------------------------------------------------------------- a head that cannot serve


def test_while_nodes_are_missing_the_answer_is_503_with_the_reason(model: Path) -> None:
    options = HeadOptions(listen="inproc://", wait=2)
    with started(Tireless, model, options) as head, serving(head) as url, client_at(url) as client:
        until(lambda: "1 of 2" in str(head.health()[1].get("reason")))
        with pytest.raises(openai.InternalServerError, match="waiting for nodes: 1 of 2") as error:
            ask(client)
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"] == "2"
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "waiting")
        assert "1 of 2" in health.json()["reason"]


def test_running_answers_end_with_an_error_when_the_server_stops(model: Path) -> None:
    with started(Tireless, model, HeadOptions(context=CONTEXT)) as head, serving(head) as url, client_at(url) as client:
        head.wait_until_serving()
        pieces = stream(client, max_tokens=None)
        next(pieces)
        next(pieces)
        head.stop_requests()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(pieces)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            ask(client)
