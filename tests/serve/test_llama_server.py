"""Shapes as in llama.cpp's tools/server/README.md."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prima_core.engine.facts import EngineFacts, SequenceFacts
from prima_core.engine.request import Sampling
from prima_core.errors import RequestError
from prima_core.serve import llama_server
from prima_core.serve.llama_server import detokenize, props, slots, tokenize
from tests.serve.fakes import FakeService, FakeTexts


def tokens(**fields: object) -> Any:  # Any: JSON
    return tokenize(json.dumps(fields).encode(), FakeTexts())["tokens"]


def text(ids: object) -> object:
    return detokenize(json.dumps({"tokens": ids}).encode(), FakeTexts())["content"]


def test_tokens_are_ids() -> None:
    assert tokens(content="a b") == [1, 2]
    assert tokens(content="") == []


def test_special_tokens_are_added_when_asked_for_and_parsed_unless_asked_not_to() -> None:
    assert tokens(content="a <end>") == [1, 2, 7]
    assert tokens(content="a <end>", parse_special=False) == [1, 2]
    assert tokens(content="a <end>", add_special=True, parse_special=None) == [0, 1, 2, 7]


def test_pieces_are_texts_or_bytes() -> None:
    class Bytes(FakeTexts):
        def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
            return [1, 0xC3]

    made = tokenize(b'{"content": "", "with_pieces": true}', Bytes())
    assert made == {"tokens": [{"id": 1, "piece": "w1"}, {"id": 0xC3, "piece": [0xC3]}]}


def test_ids_become_text_with_special_tokens_spelled_out() -> None:
    assert text([1, 7, 0xC3, 0xBC]) == "w1<end>ü"
    assert text([]) == ""


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({}, "content"), ({"content": 5}, "content"), ({"content": None}, "content"), ({"content": "", "x": 1}, "x"),
        ({"content": "", "add_special": 1}, "add_special"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_tokenize_is_named(data: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as error:
        tokens(**data)
    assert error.value.param == param


@pytest.mark.parametrize(
    ("ids", "param"), [(None, "tokens"), ("a", "tokens"), ([-1], "tokens[0]"), ([1.5], "tokens[0]"), ([256], "tokens")]
)
def test_what_are_no_tokens_is_named(ids: object, param: str) -> None:
    with pytest.raises(RequestError) as error:
        text(ids)
    assert error.value.param == param


# ---------------------------------------------------------------- what is served


def service(*running: SequenceFacts, kv_tokens: int = 25) -> FakeService:
    made = FakeService()  # with a context of ten
    made.facts = EngineFacts(running, kv_tokens=kv_tokens)
    return made


def running(n_generated: int = 4, n_computed: int = 6) -> SequenceFacts:
    return SequenceFacts(
        number=17, is_prefilling=n_generated == 0, n_prompt=3, n_generated=n_generated, n_cached=1,
        n_computed=n_computed, n_shifted=0, capacity=9,
    )  # fmt: skip


def test_properties_tell_defaults_under_llama_servers_names() -> None:
    served = service()
    served.sampling = Sampling(0.5, 7, 0.9, 0.1, 0.8, 1.1, 32, 0.2, 0.3)
    told: Any = props(served, "prima-1")
    assert (told["total_slots"], told["build_info"], told["chat_template"]) == (2, "prima-1", "a template")
    assert (told["bos_token"], told["eos_token"]) == ("w0", "<end>")
    assert told["default_generation_settings"]["n_ctx"] == 10
    params = told["default_generation_settings"]["params"]
    assert {name: params[name] for name in (
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "frequency_penalty",
        "presence_penalty",
    )} == {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repeat_penalty": 1.1,
        "repeat_last_n": 32, "frequency_penalty": 0.2, "presence_penalty": 0.3,
    }  # fmt: skip


def test_properties_do_not_tell_where_the_model_lies() -> None:
    assert props(service(), "")["model_path"] == "fake.gguf"


def test_what_the_model_has_not_is_left_out_of_its_properties() -> None:
    class Bare(FakeTexts):
        bos_id = None  # type: ignore[assignment]  # a model may have none

    served = service()
    served.tokenizer = Bare()
    served.chat_template = None  # type: ignore[assignment]  # a model may have none
    assert {"bos_token", "chat_template"} & props(served, "").keys() == set()


def test_a_slot_tells_how_far_its_request_is() -> None:
    busy, idle = slots(service(running()))
    assert busy == {
        "id": 0,
        "n_ctx": 10,
        "speculative": False,
        "is_processing": True,
        "id_task": 17,
        "n_prompt_tokens": 3,
        "n_prompt_tokens_processed": 2,
        "n_prompt_tokens_cache": 1,
        "next_token": [{"has_next_token": True, "n_remain": 3, "n_decoded": 4}],
    }
    assert idle == {"id": 1, "n_ctx": 10, "speculative": False, "is_processing": False}


def test_of_a_prompt_that_is_being_read_what_is_done_counts() -> None:
    (busy, _) = slots(service(running(n_generated=0, n_computed=2)))
    assert busy["n_prompt_tokens_processed"] == 1


def test_there_are_as_many_slots_as_full_contexts_and_running_requests() -> None:
    assert len(slots(service())) == 2
    assert len(slots(service(running(), running(), running()))) == 3
    assert len(slots(service(kv_tokens=0))) == 1  # before there is a plan


def test_answers_that_would_be_many_times_their_question_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens(content="hello", with_pieces=True)
    monkeypatch.setattr(llama_server, "MAX_PIECES", 1)
    monkeypatch.setattr(llama_server, "MAX_TEXT_BYTES", 1)
    for ask in (lambda: tokens(content="hello you", with_pieces=True), lambda: text([4, 5])):
        with pytest.raises(RequestError, match="more than 1"):
            ask()
