"""Rings of one to four processes answer as one node does, token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_core.commands.setup import node_name
from prima_core.engine.request import GREEDY, Sampling
from prima_core.interfaces import KvType
from prima_core.model.weights import Model
from prima_core.plan.plan import Plan, Visit, plan_to_json
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import DEADLINE_S, plan_of
from tests.node.cluster import Cluster
from tests.node.conftest import N_LAYERS, PROMPTS, Pool, Tokens

Start = Callable[..., Cluster]
Visits = list[tuple[str, int, int]]
L = N_LAYERS

RINGS: dict[str, Visits] = {
    "one": [("head", 0, L)],
    "one, in several visits": [("head", 0, 3), ("head", 3, L)],
    "two": [("head", 0, 4), ("w1", 4, L)],
    "two, the head computes no layer": [("w1", 0, L)],
    "two, by turns": [("head", 0, 1), ("w1", 1, 3), ("head", 3, 4), ("w1", 4, L)],
    "three, uneven": [("head", 0, 1), ("w1", 1, 6), ("w2", 6, L)],
    "four": [("head", 0, 2), ("w1", 2, 4), ("w2", 4, 6), ("w3", 6, L)],
    "four, some often": [("w1", 0, 1), ("w2", 1, 3), ("w1", 3, 4), ("head", 4, 5), ("w3", 5, 6), ("w1", 6, L)],
}
CASES = [
    *(("llama", ring) for ring in RINGS),
    ("qwen2", "four, some often"),
    ("builtin", "three, uneven"),
]


@pytest.mark.parametrize(("model", "ring"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_a_ring_answers_as_one_node(
    pool: Pool, cluster: Start, one_node: Tokens, open_models: dict[str, Model], model: str, ring: str
) -> None:
    head = cluster(open_models[model], listen=pool.address, plan=plan_of(*RINGS[ring]), wire=WirePolicy.F32)
    head.until_serving_with("head", *{node for node, _, _ in RINGS[ring]})
    for prompt in PROMPTS.values():
        assert head.tokens(prompt, 24) == one_node(model, prompt, 24)


@pytest.mark.parametrize("transport", ["unix", "tcp", "ipc", "tls+tcp"])
def test_the_command_starts_a_ring_and_leaves_nothing_behind(
    one_node: Tokens, open_models: dict[str, Model], temporary_folder: Path, tmp_path: Path, transport: str
) -> None:
    own = node_name()
    visits = (Visit(f"{own}.2", 0, 3), Visit(own, 3, 4), Visit(f"{own}.3", 4, 6), Visit(f"{own}.2", 6, L))
    plan = tmp_path / "plan.json"
    plan.write_bytes(plan_to_json(Plan(L, own, visits)))
    model = open_models["builtin"]
    ask = ["run", str(model.path), "--prompt", "what is prima?", "--temp", "0", "-n", "12", "--json"]
    ring = ["--nodes", "3", "--plan", str(plan), "--transport", transport, "--wire", "f32", "--threads", "1"]
    command = [sys.executable, "-m", "prima_core", *ask, *ring]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=True)
    answer = json.loads(done.stdout)
    assert answer["generated_ids"] == one_node("builtin", answer["prompt_ids"], 12)
    assert list(temporary_folder.iterdir()) == []


@pytest.mark.parametrize("n_local", [1, 3])
def test_threads_of_one_process_answer_as_one_node(
    cluster: Start, one_node: Tokens, open_models: dict[str, Model], n_local: int
) -> None:
    names = ["head", *(f"head.{index}" for index in range(2, n_local + 2))]
    head = cluster(open_models["qwen2"], listen="inproc://", n_local=n_local, wire=WirePolicy.F32)
    head.until_serving_with(*names)
    for prompt in PROMPTS.values():
        assert head.tokens(prompt, 24) == one_node("qwen2", prompt, 24)


@pytest.mark.parametrize("chunk", [1, 16, 64, 4096])
def test_the_size_of_chunks_does_not_change_the_answer(
    cluster: Start, one_node: Tokens, open_models: dict[str, Model], chunk: int
) -> None:
    head = cluster(open_models["llama"], listen="inproc://", n_local=2, chunk=chunk, wire=WirePolicy.F32)
    head.until_serving_with("head", "head.2", "head.3")
    assert head.tokens(PROMPTS["long"], 24) == one_node("llama", PROMPTS["long"], 24)


@pytest.mark.parametrize("kv_type", [KvType.Q8_0, KvType.F32])
def test_a_ring_with_another_type_of_kv_answers_as_one_node(
    pool: Pool, cluster: Start, one_node: Tokens, open_models: dict[str, Model], kv_type: KvType
) -> None:
    model, visits = open_models["llama"], RINGS["three, uneven"]
    alone = cluster(model, kv_type=kv_type)
    ring = cluster(model, kv_type=kv_type, listen=pool.address, plan=plan_of(*visits), wire=WirePolicy.F32)
    ring.until_serving_with("head", "w1", "w2")
    assert ring.status.plan is not None
    assert ring.status.plan.kv_type == kv_type
    expected = alone.tokens(PROMPTS["long"], 60)
    assert ring.tokens(PROMPTS["long"], 60) == expected
    assert expected != one_node("llama", PROMPTS["long"], 60)  # it does make a difference


# ---------------------------------------------------------------- company

DRAWN = Sampling(temperature=1.5, top_k=0, top_p=0.95, seed=4)


def with_nobody(head: Cluster) -> None:
    pass


def with_three_others(head: Cluster) -> None:
    for start in range(3):
        head.ask(range(start, start + 40 + 30 * start), 30 + start, Sampling(seed=start))


def with_neighbours_that_are_cancelled(head: Cluster) -> None:
    for start in range(3):
        answer = head.ask(range(start, start + 90), 200)
        if start:
            answer.take()  # it has got as far as its first token
        answer.cancel()


@pytest.mark.parametrize("company", [with_nobody, with_three_others, with_neighbours_that_are_cancelled])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_an_answer_does_not_depend_on_company(
    cluster: Start,
    one_node: Tokens,
    open_models: dict[str, Model],
    company: Callable[[Cluster], None],
    sampling: Sampling,
) -> None:
    head = cluster(open_models["llama"], listen="inproc://", n_local=2, chunk=16, wire=WirePolicy.F32)
    head.until_serving_with("head", "head.2", "head.3")
    company(head)
    first = head.ask(PROMPTS["long"], 30, sampling)
    company(head)
    second = head.ask(PROMPTS["short"], 30, sampling)
    assert first.rest() == one_node("llama", PROMPTS["long"], 30, sampling)
    assert second.rest() == one_node("llama", PROMPTS["short"], 30, sampling)


def test_more_requests_than_memory_wait_and_are_all_served(
    cluster: Start, one_node: Tokens, open_models: dict[str, Model]
) -> None:
    head = cluster(open_models["llama"], listen="inproc://", n_local=1, context=64, parallel=2, wire=WirePolicy.F32)
    head.until_serving_with("head", "head.2")
    answers = [head.ask(PROMPTS["short"], 50) for _ in range(9)]
    expected = one_node("llama", PROMPTS["short"], 50)
    assert [answer.rest() for answer in answers] == [expected] * 9
