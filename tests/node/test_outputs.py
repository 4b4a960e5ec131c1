"""Rings whose output part is on another node than the head answer as one node."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from prima_core.engine.request import GREEDY, Event, Piece, Request, Sampled, Sampling
from prima_core.model.weights import Model
from prima_core.node.coordinate import model_facts
from prima_core.plan.plan import Plan, Residency
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import DEADLINE_S, plan_of
from tests.node.cluster import Cluster, worker_process
from tests.node.conftest import N_LAYERS, PROMPTS, Pool, Tokens

Start = Callable[..., Cluster]
L = N_LAYERS
DRAWN = Sampling(temperature=1.5, top_k=0, top_p=0.95, repetition_penalty=1.2, seed=4)

RINGS = {
    "the last visit is there": [("head", 0, 4), ("w1", 4, L)],
    "it has layers": [("w1", 0, 2), ("head", 2, 5), ("w2", 5, L)],
    "it has none": [("head", 0, 4), ("w2", 4, L)],
    "the head ends the layers": [("head", 0, L)],
    "the head has no layers": [("w2", 0, 3), ("w3", 3, L)],
}


def on(output: str, plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, output=output)


@pytest.mark.parametrize("ring", RINGS)
def test_a_ring_answers_as_one_node(pool: Pool, cluster: Start, one_node: Tokens, llama: Model, ring: str) -> None:
    plan = on("w1", plan_of(*RINGS[ring]))
    head = cluster(llama, listen=pool.address, plan=plan, wire=WirePolicy.F32, chunk=16)
    head.until_serving_with(*plan.nodes)
    asked = [(prompt, sampling) for prompt in PROMPTS.values() for sampling in (GREEDY, DRAWN)]
    answers = [head.ask(prompt, 16, sampling) for prompt, sampling in asked]
    for (prompt, sampling), answer in zip(asked, answers, strict=True):
        assert answer.rest() == one_node("llama", prompt, 16, sampling)
    assert head.tokens(PROMPTS["long"], 16) == one_node("llama", PROMPTS["long"], 16), "with the prefix that was kept"


def test_an_output_part_elsewhere_may_be_streamed(pool: Pool, cluster: Start, one_node: Tokens, llama: Model) -> None:
    facts = model_facts(llama, None)
    buffer = facts.output_bytes + (40 << 20)
    streamed = Residency("w1", "numpy:cpu", facts.output_bytes, 0, facts.output_bytes, buffer)
    plan = msgspec.structs.replace(plan_of(("head", 0, 4), ("w2", 4, L)), output="w1", residency=(streamed,))
    head = cluster(llama, listen=pool.address, plan=plan, wire=WirePolicy.F32)
    head.until_serving_with("head", "w1", "w2")
    for prompt in PROMPTS.values():
        assert head.tokens(prompt, 12) == one_node("llama", prompt, 12)


def test_both_nodes_have_a_tied_matrix(cluster: Start, tied: Model) -> None:
    alone = cluster(tied)
    alone.until_serving_with("head")
    plan = on("w", plan_of(("head", 0, tied.spec.n_layers)))
    head = cluster(tied, listen="tcp://127.0.0.1:0", plan=plan, wire=WirePolicy.F32)
    with worker_process(head.address, "w", tied.path.parent):
        head.until_serving_with("head", "w")
        assert head.status.plan is not None
        facts = model_facts(tied, None)
        weights = {need.node: need.weight_bytes for need in head.status.plan.residency}
        assert weights == {
            "head": facts.input_bytes + sum(facts.layer_bytes),
            "w": facts.input_bytes + facts.output_bytes,
        }
        assert head.tokens(PROMPTS["short"], 12) == alone.tokens(PROMPTS["short"], 12)
        head.head.close()


def test_logprobs_are_those_of_one_node(cluster: Start, llama: Model, pool: Pool) -> None:
    def sampled(where: Cluster) -> list[Sampled]:
        inbox = queue.SimpleQueue[Event]()
        request = Request(tuple(PROMPTS["short"]), 8, Sampling(temperature=0, logprobs=3), ignore_eos=True)
        where.head.submit(request, inbox.put)
        pieces = []
        while isinstance(event := inbox.get(timeout=DEADLINE_S), Piece):
            pieces.append(event.sampled)
        return pieces

    alone = cluster(llama)
    head = cluster(llama, listen=pool.address, plan=on("w1", plan_of(("head", 0, L))), wire=WirePolicy.F32)
    alone.until_serving_with("head")
    head.until_serving_with("head", "w1")
    assert sampled(head) == sampled(alone)


def test_requests_end_when_the_node_with_the_output_part_dies(
    cluster: Start, llama: Model, models_folder: Path
) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=on("w", plan_of(("head", 0, L))))
    with worker_process(head.address, "w", models_folder) as worker:
        head.until_serving_with("head", "w")
        running = head.ask(PROMPTS["short"], 2000)
        running.take()
        psutil.Process(worker.pid).kill()
        assert "node 'w' was lost" in str(running.error())
        assert "'w'" in head.status.reason
