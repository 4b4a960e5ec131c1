"""Nodes whose weights come from disk in every pass answer as one that keeps all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from prima_core.arch.families import open_model
from prima_core.model.weights import Model
from prima_core.node.view import NodeView
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import until
from tests.model.part_files import split_copy
from tests.node.cluster import Cluster, worker_process
from tests.node.conftest import N_LAYERS, PROMPTS, Pool, Tokens
from tests.node.streaming import streaming_plan

Start = Callable[..., Cluster]
L = N_LAYERS
F32 = WirePolicy.F32

RINGS: dict[str, list[tuple[str, int, int]]] = {
    "one": [("head", 0, L)],
    "one, in several visits": [("head", 0, 3), ("head", 3, L)],
    "two": [("head", 0, 4), ("w1", 4, L)],
    "two, four rounds": [(name, at, at + 1) for at in range(0, L, 2) for name, at in (("head", at), ("w1", at + 1))],
    "three, two rounds, uneven": [
        *(("head", 0, 1), ("w1", 1, 3), ("w2", 3, 5)),
        *(("head", 5, 6), ("w1", 6, 7), ("w2", 7, L)),
    ],
    "three, the head computes no layer": [("w1", 0, 3), ("w2", 3, L)],
}


def view_of(cluster: Cluster, name: str) -> NodeView:
    return next(node for node in cluster.head.view().nodes if node.name == name)


def bytes_read(cluster: Cluster, name: str) -> int:
    return view_of(cluster, name).times.read_bytes


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(("share", "buffer"), [(1.0, 1), (0.4, 2)], ids=["all, tiny buffers", "some"])
def test_a_ring_that_streams_answers_as_one_node(
    pool: Pool, cluster: Start, one_node: Tokens, llama: Model, ring: str, share: float, buffer: float
) -> None:
    visits = RINGS[ring]
    names = {"head", *(node for node, _, _ in visits)}
    plan = streaming_plan(llama, visits, dict.fromkeys(sorted(names), share), buffer, rows=50)
    head = cluster(llama, listen=pool.address, plan=plan, wire=F32)
    head.until_serving_with(*names)
    before = {name: bytes_read(head, name) for name in names}  # of a worker, by its other heads
    answers = [head.ask(prompt, 12) for prompt in PROMPTS.values()]
    for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
        assert answer.rest() == one_node("llama", prompt, 12)
    for name in {node for node, _, _ in visits}:
        until(f"{name} telling what it read", lambda name=name: bytes_read(head, name) > before[name])  # type: ignore[misc]


def test_only_some_nodes_of_a_ring_may_stream(pool: Pool, cluster: Start, one_node: Tokens, llama: Model) -> None:
    visits = [("head", 0, 2), ("w1", 2, 5), ("w2", 5, L)]
    head = cluster(llama, listen=pool.address, plan=streaming_plan(llama, visits, {"w1": 1.0}, rows=50), wire=F32)
    head.until_serving_with("head", "w1", "w2")
    for prompt in PROMPTS.values():
        assert head.tokens(prompt, 12) == one_node("llama", prompt, 12)
    assert bytes_read(head, "head") == 0


def test_what_stays_and_what_comes_from_disk_is_as_the_plan_says(cluster: Start, llama: Model) -> None:
    plan = streaming_plan(llama, [("head", 0, L)], {"head": 0.5}, buffer=2)
    head = cluster(llama, plan=plan)
    head.until_serving_with("head")
    head.tokens(PROMPTS["short"], 3)
    planned, view = plan.residency[0], view_of(head, "head")
    assert view.times.pinned_bytes + view.times.streamed_bytes == planned.weight_bytes
    assert 0 <= view.times.streamed_bytes - planned.streamed_bytes < 200_000, "tensors are whole"
    assert view.times.buffer_bytes == planned.buffer_bytes
    assert view.devices[0].streamed_bytes == planned.streamed_bytes


def test_a_model_in_several_files_streams(
    cluster: Start, one_node: Tokens, models_folder: Path, tmp_path: Path
) -> None:
    first, *others = split_copy(models_folder / "llama.gguf", tmp_path, 10)
    assert len(others) > 3
    with open_model(first) as model:
        plan = streaming_plan(model, [("head", 0, 3), ("w", 3, 6), ("head", 6, L)], {"head": 1.0, "w": 0.7}, rows=50)
        head = cluster(model, listen="tcp://127.0.0.1:0", plan=plan, wire=F32)
        with worker_process(head.address, "w", tmp_path):
            head.until_serving_with("head", "w")
            assert head.tokens(PROMPTS["long"], 12) == one_node("llama", PROMPTS["long"], 12)
        head.head.close()


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("n_nodes", [1, 3])
def test_a_prompt_reads_weights_once_for_each_gather_and_not_for_each_chunk(
    cluster: Start, one_node: Tokens, llama: Model, n_nodes: int
) -> None:
    """60 chunks of 20 tokens, of which 20 go together: while a node reads for some, others come to wait."""
    names = ["head", *(f"head.{index}" for index in range(2, n_nodes + 1))]
    ends = [L * index // n_nodes for index in range(n_nodes + 1)]
    visits = [(name, ends[index], ends[index + 1]) for index, name in enumerate(names)]
    plan = streaming_plan(llama, visits, dict.fromkeys(names, 1.0), rows=400)
    plan = msgspec.structs.replace(plan, in_flight=64)
    head = cluster(llama, listen="inproc://", n_local=n_nodes - 1, plan=plan, chunk=20, wire=F32)
    head.until_serving_with(*names)
    prompt = [7 * index % 250 for index in range(1200)]
    assert head.tokens(prompt, 1) == one_node("llama", prompt, 1)
    for name in names:
        until(f"{name} telling of all steps", lambda name=name: view_of(head, name).times.n_steps >= 60)  # type: ignore[misc]
        times = view_of(head, name).times
        assert 2 * times.streamed_bytes < times.read_bytes < 12 * times.streamed_bytes


def test_a_plan_that_streams_makes_chunks_as_long_as_a_gather(cluster: Start, llama: Model) -> None:
    head = cluster(llama, plan=streaming_plan(llama, [("head", 0, L)], {"head": 1.0}, rows=300))
    head.until_serving_with("head")
    before = bytes_read(head, "head")
    head.tokens(range(200), 1)
    weights = view_of(head, "head").times.streamed_bytes
    assert bytes_read(head, "head") - before < 2.5 * weights, "one pass, and what is read ahead of the next"


# ---------------------------------------------------------------- the end


def test_closing_leaves_no_thread(cluster: Start, llama: Model) -> None:
    before = set(threading.enumerate())
    head = cluster(llama, plan=streaming_plan(llama, [("head", 0, L)], {"head": 1.0}, rows=300))
    head.until_serving_with("head")
    running = head.ask(PROMPTS["short"], 3000)
    running.take()
    assert any("read" in thread.name for thread in threading.enumerate())
    head.head.close()
    assert set(threading.enumerate()) <= before
