"""Devices that copy weights, and have memory for some of them only: plans stream, and answers are those of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest

from prima_core.interfaces import KvType
from prima_core.memory.governor import QUIET_S, Governor, Pinning
from prima_core.memory.system import Memory
from prima_core.model.weights import Model
from prima_core.node.coordinate import model_facts
from prima_core.node.head import HeadOptions
from prima_core.node.node import NodeOptions
from prima_core.node.view import NodeView
from prima_core.plan import fill, stream
from prima_core.plan.plan import Plan, Residency
from prima_core.ring import serving
from prima_core.ring.wire import WirePolicy
from prima_core.testing import cluster as testing
from prima_core.testing.cluster import NODE, plan_of, ring
from prima_core.testing.reference import greedy_ids
from prima_halda import filling, memory
from tests.node.cluster import Cluster
from tests.node.conftest import N_LAYERS, PROMPTS
from tests.node.fakegpu import add_fake_gpu
from tests.site import Site

CONTEXT = 256
GPU = "fakegpu:gpu:0"
MB = 1 << 20
SMALLEST_BUFFER = MB
"""Else nothing of so small a model could be streamed."""


@pytest.fixture
def start(llama: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    for module in (stream, fill, memory, filling):
        monkeypatch.setattr(module, "LEAST_BUFFER_BYTES", SMALLEST_BUFFER)
    with ExitStack() as exits:

        def open_cluster(backend: str, memory_bytes: int, plan: Plan | None = None) -> Cluster:
            node = replace(NODE, backend=backend, memory_bytes=memory_bytes)
            options = HeadOptions(node=node, context=CONTEXT, parallel=1, kv_type=KvType.F32, plan=plan)
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


def check_answers(cluster: testing.Cluster, model: Model) -> None:
    answers = [cluster.ask(prompt, 16) for prompt in PROMPTS.values()]
    for prompt, answer in zip(PROMPTS.values(), answers, strict=True):
        assert answer.rest() == greedy_ids(model.path, prompt, 16)


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


class Gauges:
    """What the system would tell; `available_bytes` beyond what there is for a test."""

    available_bytes = 1 << 40

    def memory(self) -> Memory:
        return Memory(4 << 30, self.available_bytes)

    def pressure(self) -> float | None:
        return None


@dataclass
class Governed:
    """The governors of a test's nodes, which look when they are told to."""

    gauges: Gauges = field(default_factory=Gauges)
    governors: list[Governor] = field(default_factory=list)
    now_s: float = 0.0

    def govern(self, store: Pinning, system: Gauges, planned_bytes: int) -> Governor:
        governor = Governor(store, self.gauges, planned_bytes, lambda: self.now_s)
        governor.start = lambda: None  # type: ignore[method-assign]
        self.governors.append(governor)
        return governor

    def look(self, available_bytes: int) -> int:
        """What the last one keeps when so much is available for a while."""
        self.gauges.available_bytes = available_bytes
        for _ in range(4):
            self.now_s += 10 * QUIET_S
            self.governors[-1].look()
        return self.governors[-1].pinned_bytes


@pytest.fixture
def governed(monkeypatch: pytest.MonkeyPatch) -> Governed:
    found = Governed()
    monkeypatch.setattr(serving, "Governor", found.govern)
    return found


def test_a_gpu_alone_streams_through_a_buffer_and_says_that_it_has_nothing_to_give_up(
    start: Callable[..., Cluster], llama: Model, site: Site, governed: Governed, caplog: pytest.LogCaptureFixture
) -> None:
    """Its host has room for the buffer only."""
    caplog.set_level("INFO")
    room, host = int(0.6 * whole(llama)), 1_100_000
    add_fake_gpu(site, sizes={GPU: room}, copies=True)
    cluster = start(GPU, host, plan_of(("head", 0, N_LAYERS)))
    need = need_of(cluster)
    assert min(need.streamed_bytes, need.buffer_bytes, need.slot_bytes) > 0
    assert need.pinned_bytes + need.slot_bytes + need.kv_bytes <= room
    assert need.host_bytes + need.buffer_bytes <= host
    check_answers(cluster, llama)
    assert view_of(cluster).times.read_bytes > need.disk_bytes > 0
    assert [governor.planned_bytes for governor in governed.governors] == [0]
    assert "node head keeps no weights in the host's memory" in caplog.text


@pytest.mark.parametrize("by", ["torch", "mlx"])
def test_what_a_gpu_alone_lacks_stays_in_its_hosts_memory_until_others_need_that(
    start: Callable[..., Cluster], llama: Model, site: Site, governed: Governed, by: str
) -> None:
    room = int(0.6 * whole(llama))
    add_fake_gpu(site, sizes={GPU: room}, copies=True, by=by)
    cluster = start(GPU, 64 * MB)
    need = need_of(cluster)
    assert need.host_bytes == need.streamed_bytes > 0
    check_answers(cluster, llama)
    assert view_of(cluster).times.read_bytes == 0
    [governor] = governed.governors
    planned = governor.pinned_bytes
    assert need.host_bytes <= planned < need.host_bytes + MB, "tensors are whole"
    for available, kept in ((MB, 0), (1 << 40, planned)):
        before = view_of(cluster).times
        assert governed.look(available) == kept
        check_answers(cluster, llama)
        times = view_of(cluster).times
        assert (times.read_bytes > before.read_bytes) == (kept == 0)
        assert times.pinned_bytes == before.pinned_bytes + (planned if kept else -planned)
    assert governed.look(1 << 40) == planned


def test_a_ring_with_a_gpu_alone_answers_as_one_node(
    llama: Model, site: Site, governed: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Visited twice in a pass; of what passes on it a part stays in its host's memory."""
    for module in (stream, fill, memory, filling):
        monkeypatch.setattr(module, "LEAST_BUFFER_BYTES", SMALLEST_BUFFER)
    add_fake_gpu(site, sizes={GPU: int(0.45 * whole(llama))}, copies=True)
    plan = plan_of(("head.2", 0, 3), ("head", 3, 4), ("head.2", 4, 7), ("head", 7, 8))
    nodes = [NODE, NodeOptions(backend=GPU, threads=1, memory_bytes=2_800_000)]
    options = HeadOptions(context=CONTEXT, parallel=1, kv_type=KvType.F32, wire=WirePolicy.F32, plan=plan)
    with ring(llama.path, nodes, options) as cluster:
        assert cluster.status.plan is not None
        need = next(need for need in cluster.status.plan.residency if need.node == "head.2")
        assert need.host_bytes > 0 < need.disk_bytes
        check_answers(cluster, llama)
        times = next(node.times for node in cluster.head.view().nodes if node.name == "head.2")
        assert times.read_bytes > 0
        for kept in (0, need.host_bytes):
            assert abs(governed.look(MB if not kept else 1 << 40) - kept) < MB // 4
            check_answers(cluster, llama)
