"""A prompt that was computed before gives the same logits, bit for bit, on one node and on rings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.engine.request import GREEDY, Finished, Request, Sampled
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import Wanted
from prima_core.interfaces import KvType
from prima_core.model.weights import Model
from prima_core.node.head import HeadOptions
from prima_core.node.node import NodeOptions
from prima_core.ring import carry
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import Answer
from tests.node.cluster import Cluster
from tests.node.conftest import PROMPTS

Start = Callable[..., Cluster]
Rows = dict[int, list[NDArray[np.float32]]]  # logits of each generated token by request
LONG = PROMPTS["long"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    seen: Rows = {}

    def recording(logits: NDArray[np.float32], want: Wanted) -> Sampled:
        seen.setdefault(want.sequence, []).append(logits.copy())
        return sample(logits, want)

    monkeypatch.setattr(carry, "sample", recording)
    return seen


def ask(head: Cluster, prompt: Sequence[int], n: int, reuse: bool = True) -> Answer:
    return head.submit(Request(tuple(prompt), n, GREEDY, ignore_eos=True, reuse_prefix=reuse))


def n_cached(answer: Answer) -> int:
    answer.rest()
    assert isinstance(answer.end, Finished)
    return answer.end.n_cached


@pytest.mark.parametrize("n_local", [0, 2], ids=["one node", "three nodes"])
@pytest.mark.parametrize(
    ("model", "kernels", "kv_type"),
    [("llama", "native", KvType.F16), ("llama", "int8", KvType.F16), ("builtin", "native", KvType.Q8_0)],
)
def test_reuse_changes_no_bit(
    open_models: dict[str, Model], rows: Rows, model: str, kernels: str, kv_type: KvType, n_local: int
) -> None:
    node = NodeOptions(threads=1, kernels=kernels)
    options = HeadOptions(node, n_local=n_local, chunk=16, context=300, kv_type=kv_type, wire=WirePolicy.F32)
    if n_local:
        options = replace(options, listen="inproc://")
    with Cluster(open_models[model], options) as head:
        head.until_serving_with("head", *(f"head.{index}" for index in range(2, n_local + 2)))
        first = ask(head, LONG[:40], 6)
        turn = (*LONG[:40], *first.rest(), *LONG[40:50])
        asked = [
            (turn, 45),  # the conversation goes on
            (turn[:43], 42),  # it goes on in another way
            ((*LONG[:20], *LONG[60:70]), 20),  # another one with the same beginning
            (LONG[:40], 39),  # the same again
        ]
        for prompt, expected in asked:
            reused, whole = ask(head, prompt, 6), ask(head, prompt, 6, reuse=False)
            assert (n_cached(reused), n_cached(whole)) == (expected, 0)
            assert reused.tokens == whole.tokens
            np.testing.assert_array_equal(rows[reused.number], rows[whole.number])


def test_choices_of_one_prompt_are_the_same_together_and_alone(
    cluster: Start, open_models: dict[str, Model], rows: Rows
) -> None:
    head = cluster(open_models["llama"], listen="inproc://", n_local=2, chunk=16, wire=WirePolicy.F32)
    head.until_serving_with("head", "head.2", "head.3")
    whole = ask(head, LONG, 8, reuse=False)
    whole.rest()
    choices = [ask(head, (5, *LONG), 8) for _ in range(5)]
    assert [n_cached(choice) for choice in choices] == [0, *[len(LONG)] * 4]
    for choice in choices[1:]:
        np.testing.assert_array_equal(rows[choice.number], rows[choices[0].number])
    np.testing.assert_array_equal(rows[ask_done(head, LONG, 8).number], rows[whole.number])


def ask_done(head: Cluster, prompt: Sequence[int], n: int) -> Answer:
    answer = ask(head, prompt, n)
    assert n_cached(answer) > 0
    return answer


@pytest.mark.parametrize("n_local", [0, 2], ids=["one node", "three nodes"])
def test_after_a_shift_the_logits_are_those_of_the_shortened_prompt(
    cluster: Start, open_models: dict[str, Model], rows: Rows, n_local: int
) -> None:
    place = {"listen": "inproc://", "n_local": n_local} if n_local else {}
    head = cluster(open_models["llama"], context=64, context_shift=True, chunk=16, wire=WirePolicy.F32, **place)
    head.until_serving_with("head", *(f"head.{index}" for index in range(2, n_local + 2)))
    long = head.submit(Request(LONG[:50], 60, GREEDY, ignore_eos=True, n_keep=10))
    context = (*LONG[:50], *long.rest()[:15])  # one more than the context has
    shortened = (*context[:10], *context[10 + 27 :])
    fresh = ask(head, shortened, 20, reuse=False)
    assert fresh.rest() == long.tokens[15:35]
    np.testing.assert_array_equal(rows[fresh.number], rows[long.number][15:35])
    assert isinstance(long.end, Finished)
    assert (len(long.tokens), long.end.n_shifted) == (60, 27 + 27)


def test_sixty_four_requests_at_once_are_all_served(cluster: Start, open_models: dict[str, Model]) -> None:
    head = cluster(open_models["llama"], context=128, parallel=2, wire=WirePolicy.F32)
    head.until_serving_with("head")
    answers = [ask(head, LONG[: 20 + number % 40], 5 + number % 7) for number in range(64)]
    assert [len(answer.rest()) for answer in answers] == [5 + number % 7 for number in range(64)]
