"""Devices that copy weights, and have memory for some of them only: plans stream, and answers are those of all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from prima_core.interfaces import KvType
from prima_core.model.weights import Model
from prima_core.node.coordinate import model_facts
from prima_core.node.head import HeadOptions
from prima_core.node.view import NodeView
from prima_core.plan import fill, stream
from prima_core.plan.plan import Residency
from prima_core.testing.cluster import NODE
from prima_core.testing.reference import greedy_ids
from prima_halda import memory, relax
from tests.node.cluster import Cluster
from tests.node.conftest import PROMPTS
from tests.node.fakegpu import add_fake_gpu
from tests.site import Site

CONTEXT = 256
GPU = "fakegpu:gpu:0"
MB = 1 << 20
SMALLEST_BUFFER = MB
"""Else nothing of so small a model could be streamed."""


@pytest.fixture
def start(llama: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    for module in (stream, fill, memory, relax):
        monkeypatch.setattr(module, "LEAST_BUFFER_BYTES", SMALLEST_BUFFER)
    with ExitStack() as exits:

        def open_cluster(backend: str, memory_bytes: int) -> Cluster:
            node = replace(NODE, backend=backend, memory_bytes=memory_bytes)
            options = HeadOptions(node=node, context=CONTEXT, parallel=1, kv_type=KvType.F32)
            return exits.enter_context(Cluster(llama, options))

        yield open_cluster


def whole(model: Model, growth: float = 1.0) -> int:
    """Bytes of all, with KV for one context."""
    facts = model_facts(model, CONTEXT, KvType.F32)
    weights = sum(facts.layer_bytes) + facts.input_bytes + facts.output_bytes
    return int(growth * weights) + facts.kv_bytes_per_token_layer * CONTEXT * facts.n_layers


def need_of(cluster: Cluster) -> Residency:
    cluster.head.wait_until_serving()
    plan = cluster.status.plan
    assert plan is not None
    [need] = plan.residency
    return need


def view_of(cluster: Cluster) -> NodeView:
    [view] = cluster.head.view().nodes
    return view


def check_answers(cluster: Cluster, model: Model) -> None:
    answers = [cluster.ask(prompt, 16) for prompt in PROMPTS.values()]
    for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
        assert answer.rest() == greedy_ids(model.path, prompt, 16)


def governors() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "prima-governor"}


@pytest.mark.parametrize("backend", ["torch:cpu", "mlx:cpu"])
def test_a_node_with_less_memory_than_the_model_takes_plans_to_stream_and_answers_as_one_with_all(
    start: Callable[..., Cluster], llama: Model, backend: str
) -> None:
    memory = int(0.9 * whole(llama))
    cluster = start(backend, memory)
    need = need_of(cluster)
    assert min(need.streamed_bytes, need.buffer_bytes, need.slot_bytes) > 0
    assert need.pinned_bytes + need.slot_bytes + need.buffer_bytes + need.kv_bytes <= memory
    check_answers(cluster, llama)
    times = view_of(cluster).times
    assert times.read_bytes > times.streamed_bytes >= need.streamed_bytes
    assert times.buffer_bytes == need.buffer_bytes


def test_a_node_gives_way_and_recovers_with_the_same_answers(start: Callable[..., Cluster], llama: Model) -> None:
    """As its governor has it do when other programs need memory."""
    cluster = start("torch:cpu", 2 * whole(llama))
    assert need_of(cluster).streamed_bytes == 0
    serving = cluster.head.node.worker._serving
    assert serving is not None
    pinned = serving.store.pinned_bytes
    for share in (0.4, 0.0, 1.0):
        serving.store.resize(int(share * pinned))
        check_answers(cluster, llama)
        assert serving.store.pinned_bytes <= max(share * pinned, 600_000), "small tensors stay"
    assert serving.store.pinned_bytes == pinned


def test_a_gpu_alone_streams_and_nobody_asks_it_to_give_way(
    start: Callable[..., Cluster], llama: Model, site: Site
) -> None:
    """What it gave up would not be the host's."""
    room = int(0.6 * whole(llama))
    add_fake_gpu(site, sizes={GPU: room}, copies=True)
    before = governors()
    cluster = start(GPU, 64 * MB)
    need = need_of(cluster)
    assert min(need.streamed_bytes, need.buffer_bytes, need.slot_bytes) > 0
    assert need.pinned_bytes + need.slot_bytes + need.kv_bytes <= room
    assert governors() == before
    check_answers(cluster, llama)
    assert view_of(cluster).times.read_bytes > need.streamed_bytes
