"""What a node's times count, and what they do not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.interfaces import KvKind, KvOp
from prima_core.ring.times import NodeTimes
from tests.ring.fakes import Ring

MakeRing = Callable[..., Ring]
BUSY_S = 0.02


@pytest.fixture
def ring_of() -> Iterator[MakeRing]:
    made: list[Ring] = []

    def make(*visits: tuple[str, int, int], streaming: Sequence[str] = ()) -> Ring:
        made.append(Ring("head", "b"))
        made[-1].load(*visits, streaming=streaming)
        return made[-1]

    yield make
    for ring in made:
        ring.close()


def times(ring: Ring, name: str) -> NodeTimes:
    return ring.workers[name].meter.times()


def busy(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    start = time.perf_counter()
    while time.perf_counter() - start < BUSY_S:
        pass
    return logits


def test_nothing_is_computed_or_sent_before_the_first_step(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 3), ("b", 3, 6))
    for name in ring.workers:
        told = times(ring, name)
        assert told.uptime_s > told.disk_s > 0
        assert told == NodeTimes(uptime_s=told.uptime_s, disk_s=told.disk_s, pinned_bytes=1000)


def test_steps_and_tokens_are_counted_once_however_often_they_visit(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 1), ("b", 1, 2), ("head", 2, 3), ("b", 3, 5), ("head", 5, 6))
    ring.answer(1, 2, 3)
    ring.answer(4)
    assert [(times(ring, name).n_steps, times(ring, name).n_tokens) for name in ring.workers] == [(2, 4), (2, 4)]


def test_a_head_without_layers_counts_no_steps_but_computes(ring_of: MakeRing) -> None:
    ring = ring_of(("b", 0, 6))
    ring.answer(1)
    assert times(ring, "head").n_steps == 0
    assert times(ring, "head").compute_s > 0


def test_bytes_and_link_seconds_are_those_of_frames(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 3), ("b", 3, 6))
    ring.answer(1, 2)
    ring.close()  # a worker counts a moment after it has sent
    for name, peer in (("head", "b"), ("b", "head")):
        assert times(ring, name).sent_bytes == sum(frame.nbytes for to, frame in ring.frames if to == peer) > 0
        assert times(ring, name).link_s > 0


def test_computing_is_what_the_shard_takes(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 6))
    ring.backends["head"].change_logits = busy
    ring.answer(1)
    assert times(ring, "head").compute_s >= BUSY_S


def test_a_node_alone_never_waits(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 6))
    for token in range(1, 6):
        ring.answer(token)
    assert times(ring, "head").wait_s == 0
    assert times(ring, "head").link_s == 0


def test_a_head_waits_while_a_step_is_with_others(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 3), ("b", 3, 6))
    ring.answer(1)
    assert times(ring, "head").wait_s > 0


def test_a_worker_does_not_wait_for_a_sequence_that_has_not_begun(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 3), ("b", 3, 6))
    ring.launch(1, kv=(KvOp(KvKind.OPEN, 1, capacity=9),))
    ring.collect()
    assert times(ring, "b").wait_s == 0
    ring.launch(1)
    ring.collect()
    waited = times(ring, "b").wait_s
    assert waited > 0
    ring.launch(kv=(KvOp(KvKind.DROP, 1),))
    ring.collect()
    assert times(ring, "b").wait_s == waited


def test_a_row_that_has_begun_is_waited_for_also_beside_one_that_has_not(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 3), ("b", 3, 6))
    ring.launch(1, 2, kv=(KvOp(KvKind.OPEN, 2, capacity=9),))
    ring.collect()
    assert times(ring, "b").wait_s > 0


# ---------------------------------------------------------------- weights that come from disk


def test_waiting_for_weights_is_no_computing(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 6), streaming=["head"])
    ring.stores["head"].stall = lambda: 100.0
    ring.answer(1)
    told = times(ring, "head")
    assert (told.stall_s, told.compute_s) == (600, 0)


def test_what_a_node_holds_now_and_has_read_is_told(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 2), ("b", 2, 6), streaming=["b"])
    ring.answer(1)
    ring.answer(2)
    told = times(ring, "b")
    assert (told.pinned_bytes, told.streamed_bytes, told.buffer_bytes, told.read_bytes) == (400, 600, 50, 8)
    assert times(ring, "head").read_bytes == 0
    assert (told.expert_hit_rate, times(ring, "head").expert_hit_rate) == (0.75, None)


def test_sums_of_reading_go_on_when_another_plan_is_loaded(ring_of: MakeRing) -> None:
    ring = ring_of(("head", 0, 2), ("b", 2, 6), streaming=["b"])
    ring.stores["b"].stall = lambda: 1.0
    ring.answer(1)
    ring.load(("head", 0, 2), ("b", 2, 6), streaming=["b"])
    ring.stores["b"].stall = lambda: 2.0
    ring.answer(2)
    assert (times(ring, "b").read_bytes, times(ring, "b").stall_s) == (8, 12)
    assert (times(ring, "b").expert_hits, times(ring, "b").expert_misses) == (24, 8)
    ring.workers["b"].unload()
    ring.close()
    told = times(ring, "b")
    assert (told.read_bytes, told.stall_s, told.pinned_bytes, told.streamed_bytes, told.buffer_bytes) == (
        8,
        12,
        0,
        0,
        0,
    )
