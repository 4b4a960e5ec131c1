from __future__ import annotations

import json
from typing import Any, get_type_hints

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, completion_create_params

from prima_core.engine.request import Finished, FinishReason, Request, Sampling
from prima_core.errors import RequestError
from prima_core.serve import openai
from prima_core.serve.openai import ChatBody, Reply, chat_body, to_request

USER = {"role": "user", "content": "hi"}
DEFAULTS = Sampling(temperature=0.5, top_k=7, top_p=0.9)
ACTED_ON = {field.name for field in msgspec.structs.fields(ChatBody)}


def body(**fields: object) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def complaint(data: bytes) -> tuple[str | None, str | None]:
    """The field that the error names, and the error's code."""
    with pytest.raises(RequestError) as error:
        chat_body(data)
    return error.value.param, error.value.code


# ---------------------------------------------------------------- fields


def test_a_body_of_all_fields_that_are_acted_on() -> None:
    told = {
        "model": "any", "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": -5, "stop": ["a", "b"], "max_tokens": 4,
        "max_completion_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    read = chat_body(body(**told))
    assert {name: getattr(read, name) for name in told if name != "stream_options"} == {
        name: value for name, value in told.items() if name != "stream_options"
    }
    assert read.include_usage
    assert set(told) | {"messages"} == ACTED_ON


def test_every_field_of_the_api_is_known() -> None:
    """So that a client that sends all of them, with null for what it does not want, is understood."""
    of_the_api = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    known = {*openai.UNSUPPORTED, *openai.LABELS, *ACTED_ON}
    assert of_the_api <= known
    assert known - of_the_api == {"top_k"}


@pytest.mark.parametrize("name", sorted({*openai.UNSUPPORTED, *openai.LABELS, *ACTED_ON} - {"messages"}))
def test_null_is_neutral(name: str) -> None:
    assert chat_body(body(**{name: None})) == chat_body(body())


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in openai.UNSUPPORTED.items() for value in values]
)
def test_a_value_that_asks_for_nothing_is_taken(name: str, value: object) -> None:
    assert chat_body(body(**{name: value})) == chat_body(body())


@pytest.mark.parametrize("name", openai.LABELS)
def test_labels_are_taken(name: str) -> None:
    assert chat_body(body(**{name: {"any": ["thing"]}})) == chat_body(body())


@pytest.mark.parametrize("name", openai.UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str) -> None:
    assert complaint(body(**{name: {"surely": "something"}})) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("n", True), ("n", "1"), ("logprobs", True), ("logprobs", 0), ("top_logprobs", 1),
        ("frequency_penalty", 0.1), ("frequency_penalty", False), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("response_format", {"type": "json_object"}), ("modalities", ["text", "audio"]),
        ("store", True), ("service_tier", "priority"), ("logit_bias", {"5": 1}),
    ],
)  # fmt: skip
def test_a_value_that_asks_for_something_is_named(name: str, value: object) -> None:
    assert complaint(body(**{name: value})) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("temperature", "1", "temperature"), ("temperature", True, "temperature"), ("temperature", -0.1, "temperature"),
        ("temperature", 101, "temperature"), ("top_p", 1.1, "top_p"), ("top_p", -1, "top_p"), ("top_k", -1, "top_k"),
        ("top_k", 1.5, "top_k"), ("seed", 1.5, "seed"), ("seed", 2**63, "seed"), ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", "5", "max_completion_tokens"), ("stream", "yes", "stream"), ("stream", 1, "stream"),
        ("model", 5, "model"), ("stop", 5, "stop"), ("stop", "", "stop"), ("stop", ["a", ""], "stop[1]"),
        ("stop", [None], "stop[0]"), ("stop", ["a"] * 17, "stop"), ("stop", "a" * 1001, "stop"),
        ("stream_options", True, "stream_options"), ("stream_options", {"usage": True}, "stream_options.usage"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
        ("messages", None, "messages"), ("messages", [], "messages"), ("messages", "hi", "messages"),
        ("messages", {}, "messages"), ("messages", ["hi"], "messages[0]"), ("messages", [USER] * 4097, "messages"),
        ("messages", [USER, {"role": "user"}], "messages[1].content"),
        ("messages", [{"content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "tool", "content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ("messages", [{**USER, "mood": "good"}], "messages[0].mood"),
        ("messages", [{**USER, "name": 5}], "messages[0].name"),
        ("best_of", 2, "best_of"), ("", 1, None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(name: str, value: object, param: str | None) -> None:
    assert complaint(body(**{name: value})) == (param, None)


def test_missing_messages_are_named() -> None:
    assert complaint(b"{}") == ("messages", None)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"hi"', b"5", b'{"messages": }', b"\xff\xfe", b'{"\xff": 1}', b"{'messages': []}",
        b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"\\ud800": 1}', b'{"messages": "\\ud800"}',
        b"[" * 100_000, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": ' * 50_000,
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    assert complaint(data) == (None, None)


@pytest.mark.parametrize("name", ["temperature", "seed", "top_k", "max_tokens", "n", "frequency_penalty", "logit_bias"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5000, "[1e999]", '{"1": 1e999}'])
def test_a_number_out_of_range_is_named(name: str, number: str) -> None:
    data = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{name}": {number}}}'
    assert complaint(data.encode())[0] == name


def test_text_that_is_not_utf8_is_named() -> None:
    assert complaint(b'{"messages": [{"role": "user", "content": "\xff"}]}') == ("messages", None)


def test_deep_nesting_in_a_label_does_no_harm() -> None:
    deep = json.loads("[" * 500 + "]" * 500)
    assert chat_body(body(metadata=deep)) == chat_body(body())


def test_the_last_of_two_equal_fields_counts() -> None:
    assert chat_body(b'{"seed": 1, "seed": 2, "messages": [{"role": "user", "content": "hi"}]}').seed == 2


# ---------------------------------------------------------------- messages


def plain(*messages: object) -> list[dict[str, str]]:
    return [message.plain() for message in chat_body(body(messages=list(messages))).messages]


def test_messages_become_what_templates_take() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"role": "developer", "content": "d"}, {"role": "user", "content": parts}) == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab"},
    ]


def test_a_name_is_passed_on_to_the_template() -> None:
    assert plain({**USER, "name": "Ada"}, {**USER, "name": None}) == [{**USER, "name": "Ada"}, USER]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = Reply.new("m").whole("hello", Finished(FinishReason.STOP, "", 1, 1))
    message = ChatCompletion.model_validate(answer).choices[0].message
    empty: dict[str, object] = {
        **dict.fromkeys(ChatCompletionMessage.model_fields),
        "annotations": [],
        "tool_calls": [],
    }
    for sent in (message.model_dump(), message.model_dump(exclude_unset=True), {**empty, **message.to_dict()}):
        assert plain(USER, sent) == [USER, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("name", openai.UNSUPPORTED_IN_MESSAGE)
def test_what_a_message_asks_for_in_vain_is_named(name: str) -> None:
    asked = body(messages=[USER, {"role": "assistant", "content": "", name: [{"id": "1"}]}])
    assert complaint(asked) == (f"messages[1].{name}", "unsupported_parameter")


def test_obfuscation_is_not_supported_and_may_be_off() -> None:
    assert not chat_body(body(stream_options={"include_obfuscation": False})).include_usage
    asked = body(stream_options={"include_obfuscation": True})
    assert complaint(asked) == ("stream_options.include_obfuscation", "unsupported_parameter")


# ---------------------------------------------------------------- requests


def request_of(n_prompt: int = 2, **fields: Any) -> Request:  # Any: JSON
    """The request for a prompt of so many tokens, in a context of ten."""
    return to_request(chat_body(body(**fields)), list(range(n_prompt)), 10, DEFAULTS)


def test_what_is_not_asked_for_is_the_servers_default() -> None:
    sampling = request_of(seed=5).sampling
    assert sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9, seed=5)


def test_zero_is_a_value_and_no_default() -> None:
    sampling = request_of(temperature=0, top_p=0, top_k=0, seed=0).sampling
    assert sampling == Sampling(temperature=0, top_k=0, top_p=0, seed=0)


def test_without_a_seed_each_request_has_its_own() -> None:
    assert request_of().sampling.seed != request_of().sampling.seed


@pytest.mark.parametrize(
    ("fields", "n_tokens"),
    [
        ({}, 9), ({"max_tokens": 4}, 4), ({"max_tokens": 9}, 9), ({"max_tokens": 10}, 9), ({"max_tokens": 10**30}, 9),
        ({"max_completion_tokens": 3}, 3), ({"max_completion_tokens": 3, "max_tokens": 5}, 3),
    ],
)  # fmt: skip
def test_wanted_tokens_are_cut_to_the_room_of_the_context(fields: dict[str, int], n_tokens: int) -> None:
    assert request_of(**fields).max_tokens == n_tokens  # 2 + 9 - 1 positions: the last token needs none


def test_a_prompt_that_fills_the_context_gets_one_token() -> None:
    assert request_of(10).max_tokens == 1


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"11 tokens.* 10 \(") as error:
        request_of(11)
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(("told", "stop"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stop_is_a_text_or_a_list(told: object, stop: tuple[str, ...]) -> None:
    assert request_of(stop=told).stop == stop


# ---------------------------------------------------------------- answers


def test_bodies_are_what_openais_own_models_take() -> None:
    reply, end = Reply.new("m"), Finished(FinishReason.LENGTH, "", 3, 4)
    whole = ChatCompletion.model_validate(reply.whole("hi", end), strict=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("hi", "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 4, 7)
    for chunk in (reply.chunk({"content": "h"}), reply.chunk({}, "stop"), reply.usage_chunk(end)):
        assert ChatCompletionChunk.model_validate(chunk, strict=True).id == whole.id


def test_answers_have_ids_of_their_own() -> None:
    assert Reply.new("m").id != Reply.new("m").id
