from __future__ import annotations

import json
import math
from typing import Any, get_type_hints

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, completion_create_params

from prima_core.engine.request import Sampled
from prima_core.errors import RequestError
from prima_core.serve import chat
from prima_core.serve.bodies import LABELS
from prima_core.serve.chat import ChatBody, ChatReply, chat_body
from prima_core.serve.replies import NO_CHANCE, Delta, Heading, Usage
from tests.serve.fakes import FakeTexts

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
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
        "max_completion_tokens": 5, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "min_tokens": 1,
        "ignore_eos": True, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1, "repeat_penalty": 1.1,
        "repeat_last_n": 10, "frequency_penalty": -1, "presence_penalty": 2, "logit_bias": {"5": -100},
        "logprobs": True, "top_logprobs": 20, "chat_template_kwargs": {"enable_thinking": False},
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
    known = {*chat.UNSUPPORTED, *LABELS, *ACTED_ON}
    assert of_the_api <= known
    assert known - of_the_api == {
        "top_k", "min_p", "typical_p", "repetition_penalty", "repeat_penalty", "repeat_last_n",
        "min_tokens", "ignore_eos", "chat_template_kwargs",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted({*chat.UNSUPPORTED, *LABELS, *ACTED_ON} - {"messages"}))
def test_null_is_neutral(name: str) -> None:
    assert chat_body(body(**{name: None})) == chat_body(body())


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in chat.UNSUPPORTED.items() for value in values]
)
def test_a_value_that_asks_for_nothing_is_taken(name: str, value: object) -> None:
    assert chat_body(body(**{name: value})) == chat_body(body())


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_taken(name: str) -> None:
    assert chat_body(body(**{name: {"any": ["thing"]}})) == chat_body(body())


@pytest.mark.parametrize("name", chat.UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str) -> None:
    assert complaint(body(**{name: {"surely": "something"}})) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("response_format", {"type": "json_object"}), ("modalities", ["text", "audio"]),
        ("store", True), ("service_tier", "priority"), ("store", 0),
    ],
)  # fmt: skip
def test_a_value_that_asks_for_something_is_named(name: str, value: object) -> None:
    assert complaint(body(**{name: value})) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("temperature", "1", "temperature"), ("temperature", True, "temperature"), ("temperature", -0.1, "temperature"),
        ("temperature", 101, "temperature"), ("top_p", 1.1, "top_p"), ("top_p", -1, "top_p"), ("top_k", -2, "top_k"),
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
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ("messages", [{**USER, "mood": "good"}], "messages[0].mood"),
        ("messages", [{**USER, "name": 5}], "messages[0].name"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "assistant", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "tool", "content": "hi"}], "messages[0].tool_call_id"),
        ("messages", [{"role": "function", "name": "f", "content": "hi"}], "messages[0].role"),
        ("messages", [{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ("messages", [USER, {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}],
         "messages[1].tool_calls[0].type"),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        ("messages", [{"role": "assistant", "tool_calls": [CALL] * 129}], "messages[0].tool_calls"),
        ("n", 0, "n"), ("n", 17, "n"), ("n", True, "n"), ("n", "1", "n"), ("min_p", 1.1, "min_p"),
        ("typical_p", -1, "typical_p"), ("repetition_penalty", 0, "repetition_penalty"),
        ("repeat_penalty", 101, "repeat_penalty"), ("repeat_last_n", -2, "repeat_last_n"),
        ("frequency_penalty", 2.1, "frequency_penalty"), ("frequency_penalty", False, "frequency_penalty"),
        ("presence_penalty", -3, "presence_penalty"), ("min_tokens", -1, "min_tokens"), ("ignore_eos", 1, "ignore_eos"),
        ("logit_bias", {"a": 1}, "logit_bias"), ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias"), ("logit_bias", {"1": None}, "logit_bias"),
        ("logit_bias", [[1, 1]], "logit_bias"), ("logit_bias", {f"{id}": 1 for id in range(1025)}, "logit_bias"),
        ("logprobs", 1, "logprobs"), ("top_logprobs", 21, "top_logprobs"), ("top_logprobs", -1, "top_logprobs"),
        ("top_logprobs", 5, "top_logprobs"), ("best_of", 2, "best_of"), ("", 1, None),
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


def plain(*messages: object) -> list[dict[str, Any]]:  # Any: JSON
    return [message.plain() for message in chat_body(body(messages=list(messages))).messages]


def test_messages_become_what_templates_take() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"role": "developer", "content": "d"}, {"role": "user", "content": parts}) == [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "ab"},
    ]


def test_a_name_is_passed_on_to_the_template() -> None:
    assert plain({**USER, "name": "Ada"}, {**USER, "name": None}) == [{**USER, "name": "Ada"}, USER]


def test_tool_calls_and_their_results_are_handed_to_the_template() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}
    result = {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "c1"}
    assert plain(asked, result) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


def test_thoughts_are_handed_to_the_template() -> None:
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert plain(message) == [message]
    assert plain({**message, "reasoning_content": None}) == [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_nulls_and_empty_lists_in_a_message_are_neutral(role: str) -> None:
    message = {"role": role, "content": "hi", **({"tool_call_id": "c1"} if role == "tool" else {})}
    nulls = dict.fromkeys(["name", "tool_calls", "tool_call_id", "reasoning_content", *chat.UNSUPPORTED_IN_MESSAGE])
    assert plain({**nulls, **message}) == plain({**message, "tool_calls": []}) == plain(message)


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = reply().whole([Delta("hello", finish_reason="stop")], USAGE)
    message = ChatCompletion.model_validate(answer).choices[0].message
    empty: dict[str, object] = {
        **dict.fromkeys(ChatCompletionMessage.model_fields),
        "annotations": [],
        "tool_calls": [],
    }
    for sent in (message.model_dump(), message.model_dump(exclude_unset=True), {**empty, **message.to_dict()}):
        assert plain(USER, sent) == [USER, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("name", chat.UNSUPPORTED_IN_MESSAGE)
def test_what_a_message_asks_for_in_vain_is_named(name: str) -> None:
    asked = body(messages=[USER, {"role": "assistant", "content": "", name: [{"id": "1"}]}])
    assert complaint(asked) == (f"messages[1].{name}", "unsupported_parameter")


def test_obfuscation_is_not_supported_and_may_be_off() -> None:
    assert not chat_body(body(stream_options={"include_obfuscation": False})).include_usage
    asked = body(stream_options={"include_obfuscation": True})
    assert complaint(asked) == ("stream_options.include_obfuscation", "unsupported_parameter")


# ---------------------------------------------------------------- answers


USAGE = Usage(n_prompt=3, n_cached=2, n_generated=4)


def reply(n_choices: int = 1, include_usage: bool = False) -> ChatReply:
    return ChatReply(Heading.new("chatcmpl", "m", "fp_1"), FakeTexts(), n_choices, include_usage)


def test_bodies_are_what_openais_own_models_take() -> None:
    made = reply(include_usage=True)
    whole = ChatCompletion.model_validate(made.whole([Delta("hi", finish_reason="length")], USAGE), strict=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("hi", "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 4, 7)
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    for chunk in (
        *made.opening(),
        made.chunk(0, Delta("h")),
        made.chunk(0, Delta(finish_reason="stop")),
        *made.closing(USAGE),
    ):
        assert ChatCompletionChunk.model_validate(chunk, strict=True).id == whole.id


def test_choices_are_numbered() -> None:
    choices: Any = reply(2).whole([Delta("a"), Delta("b")], USAGE)["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "a"), (1, "b")]
    opening: Any = list(reply(2).opening())
    assert [chunk["choices"][0]["index"] for chunk in opening] == [0, 1]


def test_logprobs_tell_each_token_its_bytes_and_the_likeliest_others() -> None:
    sampled = (Sampled(1, -0.5, ((1, -0.5), (200, -2.0))), Sampled(200, -math.inf))
    whole = ChatCompletion.model_validate(reply().whole([Delta("w1", sampled, "stop")], USAGE), strict=True)
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    first, second = whole.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("w1", -0.5, [0x77, 0x31])
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("w1", -0.5, [0x77, 0x31]),
        ("\ufffd", -2.0, [200]),
    ]
    assert (second.logprob, second.top_logprobs) == (NO_CHANCE, [])


def test_a_token_without_text_is_told_in_a_stream_for_its_logprob() -> None:
    chunk: Any = reply().chunk(0, Delta("", (Sampled(1, -1.0),)))
    assert chunk["choices"][0]["delta"] == {"content": ""}
    assert len(chunk["choices"][0]["logprobs"]["content"]) == 1


def test_thoughts_are_told_where_there_are_any() -> None:
    made: Any = reply().whole([Delta("a", reasoning="hm"), Delta("b")], USAGE)
    assert [choice["message"].get("reasoning_content") for choice in made["choices"]] == ["hm", None]
    deltas: Any = [reply().chunk(0, Delta(reasoning="hm"))["choices"], reply().chunk(0, Delta("a"))["choices"]]
    assert [choices[0]["delta"] for choices in deltas] == [{"reasoning_content": "hm"}, {"content": "a"}]


def test_answers_have_ids_of_their_own() -> None:
    assert Heading.new("a", "m", "f").id != Heading.new("a", "m", "f").id
