from __future__ import annotations

import json
from typing import Any

import pytest

from prima_core.engine.request import Request, Sampling
from prima_core.errors import RequestError
from prima_core.serve.chat import chat_body
from prima_core.serve.completions import completion_body
from prima_core.serve.generation import Prompt, Served, to_requests

DEFAULTS = Sampling(temperature=0.5, top_k=7, top_p=0.9)


def requests_of(n_prompt: int = 2, **fields: Any) -> list[Request]:  # Any: JSON
    """The requests of a chat with a prompt of so many tokens, in a context of ten."""
    body = chat_body(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode())
    return to_requests(body, [Prompt(tuple(range(n_prompt)), n_keep=1)], Served(10, False, 100, DEFAULTS))


def request_of(n_prompt: int = 2, **fields: Any) -> Request:  # Any: JSON
    (request,) = requests_of(n_prompt, **fields)
    return request


def complaint(n_prompt: int = 2, **fields: Any) -> tuple[str | None, str | None]:  # Any: JSON
    with pytest.raises(RequestError) as error:
        requests_of(n_prompt, **fields)
    return error.value.param, error.value.code


# ---------------------------------------------------------------- sampling


def test_what_is_not_asked_for_is_the_servers_default() -> None:
    assert request_of(seed=5).sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9, seed=5)


def test_zero_is_a_value_and_no_default() -> None:
    sampling = request_of(temperature=0, top_p=0, top_k=0, seed=0).sampling
    assert sampling == Sampling(temperature=0, top_k=0, top_p=0, seed=0)


def test_every_parameter_reaches_the_sampler() -> None:
    told: dict[str, Any] = {  # Any: JSON
        "temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.6, "repetition_penalty": 1.2,
        "frequency_penalty": 0.3, "presence_penalty": -0.4, "seed": 9,
    }  # fmt: skip
    asked = {**told, "repeat_last_n": 5, "logit_bias": {"3": -100, "99": 1.5}, "logprobs": True, "top_logprobs": 2}
    assert request_of(**asked).sampling == Sampling(
        **told, repetition_window=5, logit_bias=((3, -100.0), (99, 1.5)), logprobs=2
    )


def test_all_tokens_can_be_drawn_from_by_two_values() -> None:
    assert request_of(top_k=-1, seed=1) == request_of(top_k=0, seed=1)


@pytest.mark.parametrize(
    ("fields", "penalty", "window"),
    [
        ({"repeat_penalty": 1.3}, 1.3, 64),
        ({"repeat_penalty": 1.3, "repetition_penalty": 1.3}, 1.3, 64),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, 1.3, -1),
        ({"repeat_penalty": 1.3, "repeat_last_n": 0}, 1.3, 0),
        ({"repeat_last_n": 3}, 1.0, 3),
    ],
)
def test_the_repetition_penalty_has_two_names_and_a_window(fields: Any, penalty: float, window: int) -> None:
    sampling = request_of(**fields).sampling
    assert (sampling.repetition_penalty, sampling.repetition_window) == (penalty, window)


def test_two_repetition_penalties_contradict_each_other() -> None:
    assert complaint(repeat_penalty=1.3, repetition_penalty=1.2) == ("repeat_penalty", None)


def test_a_bias_for_a_token_that_the_model_has_not_is_named() -> None:
    assert complaint(logit_bias={"100": 1}) == ("logit_bias", None)


@pytest.mark.parametrize(("fields", "n"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": False}, None)])
def test_logprobs_are_told_when_they_are_asked_for(fields: Any, n: int | None) -> None:
    assert request_of(**fields).sampling.logprobs == n


# ---------------------------------------------------------------- choices


def test_choices_differ_by_their_seeds_only() -> None:
    first, *others = requests_of(n=3, seed=7, temperature=1)
    assert [request.sampling.seed for request in (first, *others)] == [7, 8, 9]
    assert all(request.prompt == first.prompt and request.max_tokens == first.max_tokens for request in others)


def test_seeds_stay_in_their_64_bits() -> None:
    assert [request.sampling.seed for request in requests_of(n=2, seed=2**63 - 1)] == [2**63 - 1, -(2**63)]


def test_without_a_seed_each_request_has_its_own() -> None:
    assert request_of().sampling.seed != request_of().sampling.seed


def test_each_prompt_has_all_choices_in_order() -> None:
    body = completion_body(json.dumps({"prompt": ["a", "b"], "n": 2, "seed": 0}).encode())
    made = to_requests(body, [Prompt((1,)), Prompt((2,))], Served(10, False, 100, DEFAULTS))
    assert [(request.prompt, request.sampling.seed) for request in made] == [((1,), 0), ((1,), 1), ((2,), 0), ((2,), 1)]


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("fields", "n_tokens"),
    [
        ({}, 9), ({"max_tokens": 4}, 4), ({"max_tokens": 9}, 9), ({"max_tokens": 10}, 9), ({"max_tokens": 10**30}, 9),
        ({"max_completion_tokens": 3}, 3), ({"max_completion_tokens": 3, "max_tokens": 5}, 3),
    ],
)  # fmt: skip
def test_wanted_tokens_are_cut_to_the_room_of_the_context(fields: dict[str, int], n_tokens: int) -> None:
    assert request_of(**fields).max_tokens == n_tokens  # 2 + 9 - 1 positions: the last token needs none


@pytest.mark.parametrize(("fields", "n_tokens"), [({}, 10), ({"max_tokens": 500}, 500)])
def test_where_the_context_shifts_an_answer_may_be_longer(fields: dict[str, int], n_tokens: int) -> None:
    body = chat_body(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode())
    (request,) = to_requests(body, [Prompt((1, 2, 3), n_keep=2)], Served(10, True, 100, DEFAULTS))
    assert (request.max_tokens, request.n_keep) == (n_tokens, 2)


def test_a_prompt_that_fills_the_context_gets_one_token() -> None:
    assert request_of(10).max_tokens == 1


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"11 tokens.* 10 \(") as error:
        request_of(11)
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")


def test_the_least_and_the_most_tokens_must_agree() -> None:
    assert request_of(min_tokens=3, max_tokens=3).min_tokens == 3
    assert request_of(min_tokens=10, max_tokens=20).min_tokens == 9  # as long as the context
    assert complaint(min_tokens=4, max_tokens=3) == ("min_tokens", None)


@pytest.mark.parametrize(("told", "stop"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stop_is_a_text_or_a_list(told: object, stop: tuple[str, ...]) -> None:
    assert request_of(stop=told).stop == stop


def test_ignoring_the_end_is_passed_on() -> None:
    assert request_of(ignore_eos=True).ignore_eos
    assert not request_of().ignore_eos
