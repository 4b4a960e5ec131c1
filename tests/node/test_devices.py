"""Several devices in one node: a visit's layers are split over them, and the answers are those of one device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.engine.request import Finished
from prima_core.errors import ClusterError
from prima_core.interfaces import Layers
from prima_core.model.weights import Model
from prima_core.node.coordinate import model_facts
from prima_core.node.head import HeadOptions
from prima_core.node.view import NodeView
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import NODE, until
from tests.node.cluster import Cluster, worker_thread
from tests.node.conftest import N_LAYERS, PROMPTS, Tokens
from tests.node.fakegpu import FakeGpu, add_fake_gpu
from tests.site import Site

CONTEXT = 256
GPU, SECOND = "fakegpu:gpu:0", "fakegpu:gpu:1"


def needs(model: Model, share: float = 1.0) -> int:
    """Bytes of a share of the layers, and of the ends of the model, with KV for one context."""
    facts = model_facts(model, CONTEXT)
    layer = facts.layer_bytes[0] + facts.kv_bytes_per_token_layer * CONTEXT
    return facts.input_bytes + facts.output_bytes + int(share * N_LAYERS) * layer


def gpu() -> FakeGpu:
    """The one that the head has opened."""
    made = sys.modules["fakegpu_plugin"].made[0]
    assert isinstance(made, FakeGpu)
    return made


@pytest.fixture
def start(llama: Model) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as exits:

        def open_cluster(backend: str = "auto", memory_bytes: int | None = None, **options: object) -> Cluster:
            node = replace(NODE, backend=backend, memory_bytes=memory_bytes)
            given = HeadOptions(node=node, context=CONTEXT, parallel=1, wire=WirePolicy.F32, **options)  # type: ignore[arg-type]
            return exits.enter_context(Cluster(llama, given))

        yield open_cluster


def split_of(cluster: Cluster) -> list[tuple[str, int]]:
    """The devices of the head's layers, and how many each has."""
    plan = cluster.status.plan
    assert plan is not None
    return [(part.device, len(part.layers)) for visit in plan.visits if visit.node == "head" for part in visit.split]


def view_of(cluster: Cluster) -> tuple[NodeView, ...]:
    return cluster.head.view().nodes


def test_what_does_not_fit_the_gpu_is_computed_by_the_cpu(
    site: Site, llama: Model, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.4)})
    cluster = start()
    cluster.until_serving_with("head")
    assert split_of(cluster) == [(GPU, 3), ("numpy:cpu", 5)]
    assert gpu().loaded == [(GPU, (Layers(0, 3),))]
    for prompt in PROMPTS.values():
        assert cluster.tokens(prompt, 24) == one_node("llama", prompt, 24)


def test_changes_of_kv_reach_the_layers_of_every_device(
    site: Site, llama: Model, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    """Requests side by side, and a next turn that goes on with what is cached."""
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.5)})
    cluster = start(backend=f"numpy:cpu,{GPU}", memory_bytes=needs(llama, 0.5))
    cluster.until_serving_with("head")
    assert split_of(cluster) == [("numpy:cpu", 4), (GPU, 4)]
    prompts = [tuple(range(first, first + 9)) for first in (5, 60, 5)]
    running = [cluster.ask(prompt, 12) for prompt in prompts]
    answers = [answer.rest() for answer in running]
    assert answers == [one_node("llama", prompt, 12) for prompt in prompts]
    turn = (*prompts[0], *answers[0], *range(90, 99))
    again = cluster.ask(turn, 12)
    assert again.rest() == one_node("llama", turn, 12)
    assert isinstance(again.end, Finished)
    assert again.end.n_cached > 0


def test_a_gpu_that_has_room_for_all_gets_all(site: Site, llama: Model, start: Callable[..., Cluster]) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama), SECOND: needs(llama)})
    cluster = start()
    cluster.until_serving_with("head")
    assert split_of(cluster) == [(GPU, N_LAYERS)]
    assert gpu().loaded == [(GPU, (Layers(0, N_LAYERS),))], "a device without layers should cost nothing"


def test_two_gpus_take_what_neither_can_alone(
    site: Site, llama: Model, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.5), SECOND: needs(llama, 0.5)})
    cluster = start(backend="fakegpu", memory_bytes=1)  # the host's memory is not asked for
    cluster.until_serving_with("head")
    assert split_of(cluster) == [(GPU, 4), (SECOND, 4)]
    assert cluster.tokens(PROMPTS["long"], 24) == one_node("llama", PROMPTS["long"], 24)


def test_two_gpus_that_are_too_small_say_so(site: Site, llama: Model, start: Callable[..., Cluster]) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.3), SECOND: needs(llama, 0.3)})
    cluster = start(backend="fakegpu")
    with pytest.raises(ClusterError, match="does not fit"):
        cluster.head.wait_until_serving()


def test_what_takes_more_bytes_on_a_unified_gpu_is_left_to_the_cpu_where_memory_is_short(
    site: Site, llama: Model, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    """All matrices are Q8_0, which shall take thrice as much there."""
    facts = model_facts(llama, CONTEXT)
    ends, layer = 3 * (facts.input_bytes + facts.output_bytes), facts.layer_bytes[0]
    kv = facts.kv_bytes_per_token_layer * CONTEXT * N_LAYERS
    room = ends + kv + 3 * (3 * layer) + 5 * layer
    add_fake_gpu(site, sizes={GPU: 2 * room}, shares_host=True, growth={"Q8_0": 3.0})
    cluster = start(memory_bytes=room)
    cluster.until_serving_with("head")
    assert split_of(cluster) == [(GPU, 3), ("numpy:cpu", 5)]
    assert cluster.tokens(PROMPTS["short"], 24) == one_node("llama", PROMPTS["short"], 24)


def test_every_node_of_a_ring_may_have_several_devices(
    site: Site, llama: Model, models_folder: Path, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    """By a plan that a hand has written, with visits by turns."""
    add_fake_gpu(site, sizes={GPU: needs(llama)})
    both = Split(GPU, 0, 1), Split("numpy:cpu", 1, 2)
    other = Split("numpy:cpu", 2, 4), Split(GPU, 4, 5), Split("numpy:cpu", 5, 6)
    visits = (Visit("head", 0, 2, both), Visit("w1", 2, 6, other), Visit("head", 6, N_LAYERS))
    cluster = start(listen="tcp://127.0.0.1:0", plan=Plan(N_LAYERS, "head", visits))
    with worker_thread(cluster.address, "w1", models_folder):
        cluster.until_serving_with("head", "w1")
        assert gpu().loaded == [(GPU, (Layers(0, 1), Layers(6, N_LAYERS)))]
        assert cluster.tokens(PROMPTS["long"], 24) == one_node("llama", PROMPTS["long"], 24)
        devices = {node.name: [(device.id, device.layers) for device in node.devices] for node in view_of(cluster)}
        assert devices["w1"] == [(GPU, (Layers(4, 5),)), ("numpy:cpu", (Layers(2, 4), Layers(5, 6)))]


def test_a_split_by_hand_that_a_device_cannot_hold_is_an_error_that_names_it(
    site: Site, llama: Model, start: Callable[..., Cluster]
) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.4)})
    cluster = start(plan=Plan(N_LAYERS, "head", (Visit("head", 0, N_LAYERS),)))
    with pytest.raises(ClusterError, match=f"node 'head' would need .* GB on {GPU} .* split them"):
        cluster.head.wait_until_serving()


# ---------------------------------------------------------------- less memory than was said


@pytest.mark.parametrize(("notices", "n_attempts"), [(True, 1), (False, 2)])
def test_a_device_that_is_fuller_than_it_said_gets_fewer_layers(
    site: Site,
    llama: Model,
    start: Callable[..., Cluster],
    one_node: Tokens,
    caplog: pytest.LogCaptureFixture,
    notices: bool,
    n_attempts: int,
) -> None:
    """At once where it then tells what it has, else one by one."""
    add_fake_gpu(site, sizes={GPU: needs(llama, 0.8)}, free={GPU: needs(llama, 0.5)}, notices=notices)
    cluster = start()
    cluster.until_serving_with("head")
    assert split_of(cluster) == [(GPU, 4), ("numpy:cpu", 4)]
    assert cluster.tokens(PROMPTS["short"], 24) == one_node("llama", PROMPTS["short"], 24)
    warnings = [record.message for record in caplog.records if f"MB on {GPU}" in record.message]
    assert len(warnings) == n_attempts
    assert "6 layers with input and output part need" in warnings[0]
    assert "4 of the layers would fit" in warnings[0]


def test_a_device_that_can_hold_nothing_ends_in_an_error_that_says_why(
    site: Site, llama: Model, start: Callable[..., Cluster]
) -> None:
    add_fake_gpu(site, sizes={GPU: needs(llama)}, free={GPU: 0})
    cluster = start(backend="fakegpu")
    with pytest.raises(ClusterError, match=f"does not fit.*on {GPU}, which has 0.0 MB available"):
        cluster.head.wait_until_serving()


@pytest.mark.parametrize("sizes", [{}, {"free": {GPU: 0}}], ids=["too small", "full"])
def test_a_gpu_that_cannot_even_hold_the_ends_of_the_model_leaves_them_to_the_cpu(
    site: Site, llama: Model, start: Callable[..., Cluster], one_node: Tokens, sizes: dict[str, object]
) -> None:
    facts = model_facts(llama, CONTEXT)
    small = {GPU: facts.input_bytes + facts.output_bytes - 1}
    add_fake_gpu(site, sizes=small, **sizes)
    cluster = start()
    cluster.until_serving_with("head")
    plan = cluster.status.plan
    assert plan is not None
    assert plan.end_device == "numpy:cpu"
    assert on_gpu(cluster) == 0, "a layer of this model is larger than the ends"
    assert cluster.tokens(PROMPTS["short"], 24) == one_node("llama", PROMPTS["short"], 24)


def test_a_worker_with_a_full_device_takes_part_with_its_cpu(
    site: Site, llama: Model, models_folder: Path, start: Callable[..., Cluster], one_node: Tokens
) -> None:
    """It has no end of the model, so its GPU is used for nothing then."""
    add_fake_gpu(site, sizes={GPU: needs(llama)}, free={GPU: 0})
    cluster = start(backend="numpy", memory_bytes=needs(llama, 0.5), listen="tcp://127.0.0.1:0", wait=2)
    with worker_thread(cluster.address, "w1", models_folder):
        until("the worker's CPU serves", lambda: cluster.serves_with("head", "w1") and not on_gpu(cluster))
        assert cluster.tokens(PROMPTS["short"], 24) == one_node("llama", PROMPTS["short"], 24)


def on_gpu(cluster: Cluster) -> int:
    plan = cluster.status.plan
    assert plan is not None
    return sum(len(part.layers) for visit in plan.visits for part in visit.split if part.device == GPU)
