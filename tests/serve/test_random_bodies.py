"""Bodies of every kind, right and wrong, to a real server: none is a 500, and every error has OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from prima_core.engine.request import Event, Request
from prima_core.node.head import Head, HeadOptions
from prima_core.serve import chat, completions
from prima_core.serve.bodies import LABELS, Neutral
from prima_core.serve.chat import ChatBody
from prima_core.serve.completions import CompletionBody
from prima_core.serve.generation import GenerationBody
from prima_core.serve.llama_server import DetokenizeBody, TokenizeBody
from tests.serve.live import serving, started

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, tuple[type[msgspec.Struct], Neutral]] = {
    CHAT: (ChatBody, chat.UNSUPPORTED),
    COMPLETIONS: (CompletionBody, completions.UNSUPPORTED),
    "/tokenize": (TokenizeBody, {}),
    "/detokenize": (DetokenizeBody, {}),
}
VOCAB_SIZE = 2048
N_EXAMPLES = 40

asked = settings(
    max_examples=N_EXAMPLES,
    deadline=None,  # other tests may be running
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Brief(Head):
    """A head whose answers have a few tokens, whatever was asked for."""

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        return super().submit(replace(request, max_tokens=min(request.max_tokens, 3), min_tokens=0), deliver)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with started(Brief, None, HeadOptions(context=2048, parallel=4)) as head, serving(head) as url:
        head.wait_until_serving()
        with httpx.Client(base_url=url, timeout=30) as client:
            yield client


# ---------------------------------------------------------------- what is sent

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
token = st.integers(0, VOCAB_SIZE - 1)
text = st.text(max_size=20)
stop = st.text(min_size=1, max_size=10)
share = st.floats(0, 1)
content = text | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=3)
call = st.fixed_dictionaries(
    {
        "id": text,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": text, "arguments": text | anything.map(json.dumps)}),
    }
)
message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user"]), "content": content}, optional={"name": text}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | content},
        optional={"tool_calls": st.lists(call, max_size=2), "reasoning_content": text, "refusal": st.none()},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": content, "tool_call_id": text}),
)


def or_null(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


GENERATION: dict[str, st.SearchStrategy[Any]] = {
    "model": text,
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 10**6),
    "ignore_eos": st.booleans(),
    "stop": stop | st.lists(stop, max_size=4),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "temperature": st.floats(0, 100),
    "top_k": st.integers(-1, 10**6),
    "top_p": share,
    "min_p": share,
    "typical_p": share,
    "repetition_penalty": st.floats(0.01, 100),
    "repeat_last_n": st.integers(-1, 1000),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(token.map(str), st.floats(-100, 100), max_size=5),
    "user": anything,
    "metadata": anything,
}
RIGHT: dict[str, tuple[dict[str, st.SearchStrategy[Any]], dict[str, st.SearchStrategy[Any]]]] = {
    CHAT: (
        {"messages": st.lists(message, min_size=1, max_size=4)},
        {
            **GENERATION,
            "max_completion_tokens": st.integers(1, 10**6),
            "logprobs": st.booleans(),
            "response_format": st.just({"type": "text"}),
            "store": st.just(False),
            "service_tier": st.just("auto"),
        },
    ),
    COMPLETIONS: (
        {
            "prompt": st.one_of(
                st.text(min_size=1, max_size=20),
                st.lists(token, min_size=1, max_size=5),
                st.lists(st.text(min_size=1, max_size=20) | st.lists(token, min_size=1), min_size=1, max_size=3),
            )
        },
        {**GENERATION, "logprobs": st.integers(0, 5), "echo": st.just(False), "suffix": st.just("")},
    ),
    "/tokenize": (
        {"content": text},
        {name: st.booleans() for name in ("add_special", "parse_special", "with_pieces")},
    ),
    "/detokenize": ({"tokens": st.lists(token)}, {}),
}


def right(path: str) -> st.SearchStrategy[dict[str, Any]]:
    needed, optional = RIGHT[path]
    return st.fixed_dictionaries(needed, optional={name: or_null(values) for name, values in optional.items()})


def fields_of(path: str) -> list[str]:
    kind, unsupported = BODIES[path]
    return [*(field.name for field in msgspec.structs.fields(kind)), *unsupported, *LABELS]


def wild(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A right body in which some fields are anything, or unknown."""
    names = st.sampled_from(fields_of(path)) | text
    return st.builds(lambda body, others: {**body, **others}, right(path), st.dictionaries(names, anything, max_size=3))


# ---------------------------------------------------------------- what comes back


def check_error(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


def check_answer(path: str, body: dict[str, Any], answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    if path not in (CHAT, COMPLETIONS):
        assert list(answer.json()) == ["tokens" if path == "/tokenize" else "content"]
        return
    kinds: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
        CHAT: (ChatCompletion, ChatCompletionChunk),
        COMPLETIONS: (Completion, CompletionChunk),
    }
    whole, chunk = kinds[path]
    if not body.get("stream"):
        whole.model_validate_json(answer.text, strict=True)
        return
    *events, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    for event in events:
        chunk.model_validate_json(event.removeprefix("data: "), strict=True)


class ChunkChoice(CompletionChoice):
    """OpenAI's server tells the reason with the last chunk only, but its client's model does not know that."""

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]


class CompletionChunk(Completion):
    choices: list[ChunkChoice]  # type: ignore[assignment]  # see above


@asked
@given(data=st.data())
@pytest.mark.parametrize("path", BODIES)
def test_a_right_body_is_answered(client: httpx.Client, path: str, data: st.DataObject) -> None:
    body = data.draw(right(path))
    check_answer(path, body, client.post(path, json=body))


@asked
@given(data=st.data())
@pytest.mark.parametrize("path", BODIES)
def test_any_body_is_answered_or_refused_in_openais_shape(client: httpx.Client, path: str, data: st.DataObject) -> None:
    body = data.draw(wild(path))
    answer = client.post(path, json=body)
    if answer.status_code == 200:
        check_answer(path, body, answer)
    else:
        check_error(answer)


WRONG: dict[str, list[Any]] = {  # Any: JSON
    "model": [5],
    "n": [0, 17, -1, 1.5, "2", True],
    "max_tokens": [0, -1, 1.5, "5", True],
    "min_tokens": [-1, 1.5, "1"],
    "ignore_eos": [0, 1, "yes"],
    "stop": ["", [""], 5, ["a"] * 17],
    "stream": [1, "yes", {}],
    "stream_options": [True, {"usage": True}, []],
    "seed": [2**63, 0.5, "1"],
    "temperature": [-0.1, 100.1, 1e300, "1", True],
    "top_k": [-2, 0.5],
    "top_p": [1.01, -1],
    "min_p": [1.01, -1],
    "typical_p": [1.01, -1],
    "repetition_penalty": [0, -1, 100.1],
    "repeat_penalty": [0, -1, 100.1],
    "repeat_last_n": [-2, 2**21],
    "frequency_penalty": [2.01, -2.01],
    "presence_penalty": [2.01, -2.01],
    "logit_bias": [{"a": 1}, {"1": 101}, {str(VOCAB_SIZE): 1}, [], {"1": None}],
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_wrong_field_is_named(client: httpx.Client, path: str) -> None:
    assert {field.name for field in msgspec.structs.fields(GenerationBody)} == set(WRONG)
    body = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    for name, values in WRONG.items():
        for value in values:
            error = check_error(client.post(path, json={**body, name: value}))
            assert str(error["param"]).startswith(name), (name, value)


@asked
@given(data=st.binary(max_size=60) | wild(CHAT).map(lambda body: json.dumps(body).encode()[:-1]))
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_what_is_no_json_object_is_refused(client: httpx.Client, path: str, data: bytes) -> None:
    check_error(client.post(path, content=data, headers={"Content-Type": "application/json"}))
