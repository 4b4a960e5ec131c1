from __future__ import annotations

import json
from typing import Any, get_type_hints

import msgspec
import pytest
from openai.types import Completion, completion_create_params

from prima_core.engine.request import Sampled
from prima_core.errors import RequestError
from prima_core.serve import completions
from prima_core.serve.bodies import LABELS
from prima_core.serve.completions import CompletionBody, CompletionReply, completion_body, echoes, encode_prompts
from prima_core.serve.replies import Delta, Heading, Usage
from tests.serve.fakes import FakeTexts

ACTED_ON = {field.name for field in msgspec.structs.fields(CompletionBody)}
USAGE = Usage(n_prompt=3, n_cached=2, n_generated=4)


def body(**fields: object) -> CompletionBody:
    return completion_body(json.dumps({"prompt": "hi", **fields}).encode())


def complaint(**fields: object) -> tuple[str | None, str | None]:
    """The field that the error names, and the error's code."""
    with pytest.raises(RequestError) as error:
        body(**fields)
    return error.value.param, error.value.code


# ---------------------------------------------------------------- bodies


def test_every_field_of_the_api_is_known() -> None:
    of_the_api = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    assert of_the_api <= {*completions.UNSUPPORTED, *LABELS, *ACTED_ON}


@pytest.mark.parametrize("name", sorted({*completions.UNSUPPORTED, *LABELS, *ACTED_ON} - {"prompt"}))
def test_null_is_neutral(name: str) -> None:
    assert body(**{name: None}) == body()


@pytest.mark.parametrize(("name", "value"), [("suffix", "the end"), ("best_of", 3), ("best_of", 0)])
def test_what_is_not_supported_is_named(name: str, value: object) -> None:
    assert complaint(**{name: value, "n": 2}) == (name, "unsupported_parameter")


@pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": ""}, {"best_of": 1}])
def test_a_value_that_asks_for_nothing_is_taken(fields: dict[str, object]) -> None:
    assert body(**fields).prompts == ["hi"]


def test_an_echo_stands_before_every_choice_of_its_prompt() -> None:
    asked = body(prompt=["a b", [1, 7]], n=2, echo=True)
    told = echoes(asked, FakeTexts())
    assert told == ["a b", "a b", "w1<end>", "w1<end>"]
    reply = CompletionReply(Heading("id", 1, "fake", "fp"), FakeTexts(), echoes=told)
    choices = reply.whole([Delta(text) for text in "wxyz"], USAGE)["choices"]
    assert [choice["text"] for choice in choices] == ["a bw", "a bx", "w1<end>y", "w1<end>z"]  # type: ignore[attr-defined]  # JSON
    opening = [chunk["choices"][0] for chunk in reply.opening()]  # type: ignore[index]  # JSON
    assert [(choice["index"], choice["text"]) for choice in opening] == list(enumerate(told))


def test_without_an_echo_a_stream_begins_with_the_answer() -> None:
    assert echoes(body(), FakeTexts()) == []
    assert not list(CompletionReply(Heading("id", 1, "fake", "fp"), FakeTexts()).opening())


def test_an_echo_has_no_logprobs() -> None:
    assert complaint(echo=True, logprobs=0)[0] == "echo"


def test_the_best_of_as_many_as_are_wanted_are_all() -> None:
    assert body(n=3, best_of=3).n_choices == 3


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", ["a b"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [2]], ["a", [2]]),
    ],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_them(prompt: object, prompts: list[object]) -> None:
    assert body(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": {}}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"), ({"prompt": [1.5]}, "prompt[0]"), ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a", None]}, "prompt[1]"), ({"prompt": [["a"]]}, "prompt[0][0]"), ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 33, "n": 2}, "n"), ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"), ({"top_logprobs": 1}, "top_logprobs"), ({"n": 17}, "n"),
        ({"max_completion_tokens": 1}, "max_completion_tokens"), ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(fields: dict[str, object], param: str) -> None:
    assert complaint(**fields) == (param, None)


def test_a_completion_is_short_unless_told_otherwise() -> None:
    assert (body().n_most, body(max_tokens=500).n_most) == (16, 500)


# ---------------------------------------------------------------- prompts


def test_a_prompt_is_the_whole_input() -> None:
    assert encode_prompts(["a b <end>", [5, 6]], FakeTexts()) == [(0, 1, 2, 3, 7), (5, 6)]


@pytest.mark.parametrize("ids", [[], [256], [1, 10**30]])
def test_ids_that_make_no_prompt_are_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError) as error:
        encode_prompts(["a", ids], FakeTexts())
    assert error.value.param == "prompt"


# ---------------------------------------------------------------- answers


def reply(include_usage: bool = False) -> CompletionReply:
    return CompletionReply(Heading.new("cmpl", "m", "fp_1"), FakeTexts(), include_usage)


def test_bodies_are_what_openais_own_models_take() -> None:
    made = reply(include_usage=True)
    whole = Completion.model_validate(
        made.whole([Delta("a", (), "stop"), Delta("b", (), "length")], USAGE), strict=True
    )
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert whole.usage is not None
    assert whole.usage.total_tokens == 7
    assert list(made.opening()) == []
    last: Any = made.chunk(1, Delta(finish_reason="stop"))
    assert Completion.model_validate(last, strict=True).choices[0].index == 1
    (usage,) = made.closing(USAGE)
    assert Completion.model_validate(usage, strict=True).id == whole.id
    assert list(reply().closing(USAGE)) == []


SAMPLED = (
    Sampled(1, -0.5, ((1, -0.5), (2, -1.0))),
    Sampled(0xC3, -3.0, ((2, -0.25), (1, -1.0))),
    Sampled(0xBC, -1.0),
    Sampled(7, -0.1),
    Sampled(12, -0.1),
)


def test_logprobs_have_the_old_form() -> None:
    whole = Completion.model_validate(reply().whole([Delta("w1üw12", SAMPLED, "stop")], USAGE), strict=True)
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.tokens == ["w1", "bytes:\\xc3", "bytes:\\xbc", "<end>", "w12"]
    assert told.token_logprobs == [-0.5, -3.0, -1.0, -0.1, -0.1]
    assert told.top_logprobs is not None
    assert told.top_logprobs[:2] == [{"w1": -0.5, "w2": -1.0}, {"w2": -0.25, "w1": -1.0, "bytes:\\xc3": -3.0}]
    assert told.text_offset == [0, 2, 2, 3, 3]


def test_offsets_go_on_through_a_stream_for_each_choice() -> None:
    made = reply()
    chunks: Any = [made.chunk(index, Delta("", (one,))) for one in SAMPLED for index in (0, 1)]
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"][0] for chunk in chunks]
    assert offsets == [0, 0, 2, 2, 2, 2, 3, 3, 3, 3]
