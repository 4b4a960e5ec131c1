"""The built-in model behind the server, asked by OpenAI's own client, which checks every answer's shape strictly."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from prima_core.engine.request import FinishReason
from prima_core.node.head import HeadOptions
from tests.serve.live import Tireless, Watched, client_at, serving, started, until

CONTEXT = 2048
QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story about an owl."}]  # Any: of many types in the client
ASK: dict[str, Any] = {"model": "any", "messages": QUESTION, "max_tokens": 12}  # Any: JSON


@pytest.fixture(scope="module")
def head() -> Iterator[Watched]:
    with started(Watched, None, HeadOptions(context=CONTEXT, parallel=8)) as head:
        head.wait_until_serving()
        yield head


@pytest.fixture(scope="module")
def url(head: Watched) -> Iterator[str]:
    with serving(head) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_at(url, strict=True) as client:
        yield client


def chat(client: openai.OpenAI, **wishes: Any) -> ChatCompletion:  # Any: any parameter of the API
    reply: ChatCompletion = client.chat.completions.create(**{**ASK, "temperature": 0, **wishes})
    return reply


def texts(reply: ChatCompletion) -> list[str | None]:
    return [choice.message.content for choice in reply.choices]


def streamed(client: openai.OpenAI, **wishes: Any) -> list[ChatCompletionChunk]:  # Any: any parameter of the API
    chunks: Any = client.chat.completions.create(**{**ASK, "temperature": 0, "stream": True, **wishes})
    return list(chunks)


def texts_of(chunks: list[ChatCompletionChunk], n: int = 1) -> list[str]:
    made = [""] * n
    for chunk in chunks:
        for choice in chunk.choices:
            made[choice.index] += choice.delta.content or ""
    return made


def completion(client: openai.OpenAI, **wishes: Any) -> Completion:  # Any: any parameter of the API
    reply: Completion = client.completions.create(**{"model": "any", "prompt": "The owl", "temperature": 0, **wishes})
    return reply


# ---------------------------------------------------------------- models


def test_models_tell_their_sizes(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    meta: Any = (model.model_extra or {})["meta"]
    assert (meta["n_vocab"], meta["n_ctx_train"], meta["n_ctx"], meta["n_embd"]) == (2048, 2048, CONTEXT, 256)
    assert 5_000_000 < meta["n_params"] < meta["size"] < 6_000_000


# ---------------------------------------------------------------- chats


def test_a_chat_with_every_parameter(client: openai.OpenAI) -> None:
    reply = chat(
        client, temperature=0.5, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={"5": -100}, seed=1,
        n=2, stop=["zebra"], logprobs=True, top_logprobs=2, max_completion_tokens=4, user="me", metadata={"a": "b"},
        store=False, service_tier="auto", response_format={"type": "text"}, stream=False, tools=[],
        extra_body={"top_k": 5, "min_p": 0.01, "typical_p": 0.99, "repetition_penalty": 1.1, "min_tokens": 2,
                    "ignore_eos": True},
    )  # fmt: skip
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    assert reply.system_fingerprint
    assert reply.usage
    assert reply.usage.completion_tokens == 8


def test_every_role_is_understood(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "owl"}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be true."}]},
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "an owl", "tool_call_id": "c1"},
    ]
    assert texts(chat(client, messages=messages))[0]


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = streamed(client, stream_options={"include_usage": True})
    assert texts_of(chunks) == texts(whole)
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert [choice.finish_reason for chunk in chunks[:-1] for choice in chunk.choices if choice.finish_reason] == [
        "length"
    ]


def test_choices_are_what_their_seeds_give_alone(client: openai.OpenAI) -> None:
    alone = [texts(chat(client, seed=seed, temperature=1.5))[0] for seed in (5, 6, 7)]
    together = chat(client, seed=5, n=3, temperature=1.5)
    assert len(set(alone)) > 1
    assert texts(together) == alone
    assert texts_of(streamed(client, seed=5, n=3, temperature=1.5), 3) == alone
    assert together.usage
    assert together.usage.prompt_tokens < 2 * 16
    assert together.usage.completion_tokens == 36


def test_a_prompt_that_was_there_before_is_told_as_cached(client: openai.OpenAI) -> None:
    chat(client)
    again = chat(client)
    assert again.usage
    assert again.usage.prompt_tokens_details
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_logprobs_spell_the_answer_and_the_likeliest_token_is_drawn(client: openai.OpenAI) -> None:
    reply = chat(client, logprobs=True, top_logprobs=3)
    told = reply.choices[0].logprobs
    assert told
    assert told.content
    assert len(told.content) == 12
    assert b"".join(bytes(entry.bytes or []) for entry in told.content).decode() == texts(reply)[0]
    for entry in told.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
    chunks = streamed(client, logprobs=True, top_logprobs=3)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    pieces = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert pieces == told.content


def test_a_bias_decides(client: openai.OpenAI) -> None:
    (token,) = token_ids(client, " owl")[-1:]
    assert "owl owl owl" in str(texts(chat(client, logit_bias={str(token): 100}))[0])


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    text = str(texts(chat(client))[0])
    stop = text.split()[3]
    reply = chat(client, stop=[stop, "never said"])
    assert reply.choices[0].finish_reason == "stop"
    assert texts(reply)[0] == text[: text.index(stop)] == texts_of(streamed(client, stop=stop))[0]


def test_the_least_number_of_tokens_is_kept(client: openai.OpenAI) -> None:
    short = chat(client, messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=100)
    assert short.choices[0].finish_reason == "stop"
    assert short.usage
    n = short.usage.completion_tokens + 5
    longer = chat(client, messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=n,
                  extra_body={"min_tokens": n})  # fmt: skip
    assert longer.usage
    assert longer.usage.completion_tokens == n


# ---------------------------------------------------------------- errors


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    for wishes, param, code in (
        ({"n": 17}, "n", None),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": QUESTION * 200}, "messages", "context_length_exceeded"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, **wishes)
        assert (error.value.param, error.value.code) == (param, code)
    with pytest.raises(openai.BadRequestError) as error:
        completion(client, suffix="the end")
    assert error.value.param == "suffix"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="hi")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# ---------------------------------------------------------------- completions


def token_ids(client: openai.OpenAI, text: str) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/")
    ids: list[int] = httpx.post(f"{url}/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    return ids


def test_a_prompt_may_be_text_or_ids_or_many(client: openai.OpenAI) -> None:
    owl, cat = (completion(client, prompt=prompt).choices[0].text for prompt in ("The owl", "The cat"))
    owl_ids, cat_ids = (token_ids(client, prompt) for prompt in ("The owl", "The cat"))
    assert completion(client, prompt=owl_ids).choices[0].text == owl
    for prompt in (["The owl", "The cat"], [owl_ids, cat_ids]):
        reply = completion(client, prompt=prompt)
        assert [(choice.index, choice.text) for choice in reply.choices] == [(0, owl), (1, cat)]
        assert reply.usage
        assert reply.usage.prompt_tokens == len(owl_ids) + len(cat_ids)


def test_every_prompt_has_its_choices(client: openai.OpenAI) -> None:
    wishes: dict[str, Any] = {"temperature": 1.5, "seed": 3}
    reply = completion(client, prompt=["The owl", "The cat"], n=2, best_of=2, **wishes)
    assert [choice.text for choice in reply.choices] == [
        completion(client, prompt=prompt, **{**wishes, "seed": seed}).choices[0].text
        for prompt in ("The owl", "The cat")
        for seed in (3, 4)
    ]


def test_special_tokens_in_a_prompt_are_special(client: openai.OpenAI) -> None:
    """So that who writes a template himself gets what the chat gives."""
    prompt = f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert completion(client, prompt=prompt, max_tokens=12).choices[0].text == texts(chat(client))[0]


def test_a_completion_is_streamed_as_openais_server_does_it(url: str, client: openai.OpenAI) -> None:
    """Its client's strict model wants a reason of the end in every chunk, which no server tells."""
    with client_at(url) as lenient:
        chunks: Any = lenient.completions.create(model="any", prompt="The owl", temperature=0, stream=True)
        choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == completion(client).choices[0].text
    assert [choice.finish_reason for choice in choices[-2:]] == [None, "length"]


def test_completions_have_logprobs_of_the_old_form(client: openai.OpenAI) -> None:
    reply = completion(client, logprobs=2, max_tokens=6)
    told = reply.choices[0].logprobs
    assert told
    assert told.tokens
    assert told.text_offset
    assert told.top_logprobs
    assert "".join(told.tokens) == reply.choices[0].text
    pieces = zip(told.text_offset, told.tokens, strict=True)
    assert all(reply.choices[0].text[at:].startswith(piece) for at, piece in pieces)
    assert [len(top) for top in told.top_logprobs] == [2] * 6


# ---------------------------------------------------------------- many at once


def test_64_streams_at_the_same_time_say_what_each_says_alone(client: openai.OpenAI, url: str) -> None:
    questions = [f"Tell me a story about {animal}." for animal in ("an owl", "a cat", "a fox", "a hen")]
    wishes: dict[str, Any] = {"temperature": 1, "max_tokens": 20, "seed": 11}
    alone = [texts(chat(client, messages=[{"role": "user", "content": text}], **wishes))[0] for text in questions]

    async def one(asynchronous: openai.AsyncOpenAI, text: str) -> str:
        chunks = await asynchronous.chat.completions.create(
            model="any", messages=[{"role": "user", "content": text}], stream=True, **wishes
        )
        return "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=50, _strict_response_validation=True
        ) as asynchronous:
            return list(await asyncio.gather(*(one(asynchronous, text) for text in questions * 16)))

    assert asyncio.run(all_of_them()) == alone * 16


# ---------------------------------------------------------------- slow readers and cut connections


def opened(url: str, **wishes: object) -> socket.socket:
    """A connection on which a stream was asked for and nothing is read."""
    body = json.dumps({**ASK, "stream": True, **wishes}).encode()
    place = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # so that little is enough to block the sender
    connection.settimeout(20)
    connection.connect((place.hostname, place.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def busy_slots(url: str) -> int:
    return sum(slot["is_processing"] for slot in httpx.get(f"{url}/slots").json())


def test_slow_readers_hold_no_slots(url: str, client: openai.OpenAI) -> None:
    """Their answers are more than sockets hold, so the server waits for them; the engine does not."""
    wishes = {"max_tokens": 300, "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 20}
    connections = [opened(url, **wishes) for _ in range(4)]
    try:
        until(lambda: busy_slots(url) > 0)
        until(lambda: busy_slots(url) == 0)
        assert texts(chat(client))[0]
        for connection in connections:
            data = read_until(connection, b"[DONE]")
            assert len(data) > 1_000_000
            assert data.count(b'"finish_reason":"length"') == 2
    finally:
        for connection in connections:
            connection.close()


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = bytearray()
    while end not in data[-100:]:
        part = connection.recv(65536)
        assert part, "the stream broke off"
        data += part
    return bytes(data)


def test_cut_connections_give_their_slots_back() -> None:
    options = HeadOptions(context=CONTEXT, parallel=4)
    with started(Tireless, None, options) as head, serving(head) as url:
        head.wait_until_serving()
        connections = [opened(url, max_tokens=CONTEXT, n=n) for n in (1, 2, 1, 3)]
        for connection in connections[:2]:
            assert connection.recv(16).startswith(b"HTTP/1.1 200")
        for connection in connections:  # cut as when a cable is pulled: no goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert {head.ends.get(timeout=20) for _ in range(7)} == {FinishReason.CANCELLED}
        assert head.load == (0, 0)
        assert busy_slots(url) == 0
