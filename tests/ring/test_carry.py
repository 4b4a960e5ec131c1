"""Steps that wait on a node whose weights come from disk go through it as one; nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from prima_core.errors import ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, Step
from prima_core.ring.reports import Collected, LoadFailed
from prima_core.testing.cluster import until
from tests.ring.fakes import DEADLINE_S, FIRST, Ring, after

MakeRing = Callable[..., Ring]
THREE = ("head", 0, 2), ("b", 2, 4), ("c", 4, 6)


@pytest.fixture
def ring_of() -> Iterator[MakeRing]:
    made: list[Ring] = []

    def make(*visits: tuple[str, int, int], streaming: str = "", gather_rows: int = 100) -> Ring:
        made.append(Ring("head", "b", "c"))
        made[-1].load(*visits, streaming=streaming.split(), gather_rows=gather_rows)
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@contextmanager
def held_up(ring: Ring, name: str) -> Iterator[None]:
    """The node is busy with a step of token 1 till the block has ended and what it launched is there, which waits."""
    backend, busy, free, n_before = ring.backends[name], threading.Event(), threading.Event(), ring.numbers + 1

    def wait() -> None:
        busy.set()
        assert free.wait(DEADLINE_S)

    backend.before_run = wait
    try:
        ring.launch(1)
        assert busy.wait(DEADLINE_S)
        backend.before_run = lambda: None
        yield
        jobs = ring.workers[name]._jobs
        until(f"all steps waiting at {name}", lambda: jobs.qsize() == ring.numbers - n_before)
    finally:
        free.set()


def rows_of(ring: Ring, name: str) -> list[int]:
    return [step.n_tokens for _, step in ring.backends[name].steps]


def answers(ring: Ring, n: int) -> list[tuple[object, ...]]:
    results = [ring.collect() for _ in range(n)]
    assert [result.number for result in results] == list(range(ring.numbers - n + 1, ring.numbers + 1))
    return [result.tokens for result in results]


def expected(*steps: tuple[int, ...]) -> list[tuple[object, ...]]:
    return [tuple((token, after(token)) for token in tokens) for tokens in steps]


# ---------------------------------------------------------------- what goes together


@pytest.mark.parametrize("name", ["head", "b", "c"])
def test_steps_that_wait_are_run_as_one_and_go_on_as_they_came(ring_of: MakeRing, name: str) -> None:
    ring = ring_of(*THREE, streaming=name)
    with held_up(ring, name):
        ring.launch(2, 3)
        ring.launch(4)
        ring.launch(5, 6, 7)
    assert answers(ring, 4) == expected((1,), (2, 3), (4,), (5, 6, 7))
    assert {other: rows_of(ring, other) for other in ring.workers} == {
        other: [1, 6] if other == name else [1, 2, 1, 3] for other in ring.workers
    }
    assert ring.stores[name].read_bytes == 2 * 2, "two layers, read once for each of two runs"
    times = ring.workers[name].meter.times()
    assert (times.n_steps, times.n_tokens) == (4, 7)


def test_a_node_that_keeps_its_weights_runs_steps_as_they_come(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="c")
    with held_up(ring, "b"):
        for token in (2, 3):
            ring.launch(token)
    assert answers(ring, 3) == expected((1,), (2,), (3,))
    assert rows_of(ring, "b") == [1, 1, 1]


def test_no_more_rows_go_together_than_the_plan_has_room_for(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b", gather_rows=3)
    with held_up(ring, "b"):
        for tokens in ((2, 3), (4,), (5,), (6, 7, 8, 9)):
            ring.launch(*tokens)
    answers(ring, 5)
    assert rows_of(ring, "b") == [1, 3, 1, 4]


def test_a_plan_without_room_for_it_has_nothing_gathered(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b", gather_rows=0)
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3)
    assert answers(ring, 3) == expected((1,), (2,), (3,))
    assert rows_of(ring, "b") == [1, 1, 1]


def test_steps_gather_at_one_visit_while_others_wait_at_another(ring_of: MakeRing) -> None:
    """The second step comes to b for the first time while the first comes back to it."""
    ring = ring_of(("b", 0, 2), ("c", 2, 4), ("b", 4, 6), streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3)
        ring.launch(4)
    assert answers(ring, 4) == expected((1,), (2,), (3,), (4,))
    assert sorted(layers.start for layers, _ in ring.backends["b"].steps[:2]) == [0, 0]
    assert ring.backends["b"].steps[1][1].n_tokens == 3


def test_visits_of_a_node_that_follow_each_other_are_one_way(ring_of: MakeRing) -> None:
    ring = ring_of(("b", 0, 2), ("b", 2, 5), ("head", 5, 6), streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3)
    assert answers(ring, 3) == expected((1,), (2,), (3,))
    assert rows_of(ring, "b") == [1, 1, 2, 2]


def test_changes_of_kv_come_before_all_rows_of_a_gather(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    opened = KvOp(KvKind.OPEN, 3, capacity=9)
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3, kv=(opened,))
    answers(ring, 3)
    assert ring.backends["b"].steps[1][1] == Step((Chunk(2, 0, 1), Chunk(3, 0, 1)), (opened,))


def test_a_change_of_a_sequence_that_has_rows_waits_for_them(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3, kv=(KvOp(KvKind.DROP, 2),))
        ring.launch(4)
    assert answers(ring, 4) == expected((1,), (2,), (3,), (4,))
    assert rows_of(ring, "b") == [1, 1, 2]


# ---------------------------------------------------------------- what goes wrong


def test_a_step_that_cannot_be_hurts_no_other_of_its_gather(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        for token in (2, 3, 4):
            ring.launch(token)
        ring.backends["b"].refuses = 3
    first, second, third, fourth = (ring.collect() for _ in range(4))
    assert "is not open" in str(third.error)
    assert [result.tokens for result in (first, second, fourth)] == expected((1,), (2,), (4,))


def test_a_disk_that_fails_fails_all_steps_of_the_gather_and_the_node_tells(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3)
        ring.backends["b"].breaks["run"] = ModelError("model.gguf cannot be read", field="file")
    told = [ring.outcome() for _ in range(4)]
    failed = [report for _, report in told if isinstance(report, LoadFailed)]
    results = [report.result for _, report in told if isinstance(report, Collected)]
    assert [result.number for result in results] == [1, 2, 3]
    assert results[0].error is None
    for result in results[1:]:
        assert "node 'b': " in str(result.error)
        assert "model.gguf cannot be read" in str(result.error)
    assert [(report.epoch, report.error.message) for report in failed] == [(FIRST, "file: model.gguf cannot be read")]
    assert ("b", failed[0]) in told


def test_an_error_on_its_way_keeps_its_place_between_steps_that_wait(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.backends["head"].refuses = 3
        ring.launch(3)
        ring.launch(4)
    first, second, third, fourth = (ring.collect() for _ in range(4))
    assert [first.number, second.number, third.number, fourth.number] == [1, 2, 3, 4]
    assert "node 'head': " in str(third.error)
    assert [second.tokens, fourth.tokens] == expected((2,), (4,))
    assert rows_of(ring, "b") == [1, 1, 1], "an error between them parts a gather"


def test_a_frame_that_came_twice_is_left_out_of_a_gather(ring_of: MakeRing, caplog: pytest.LogCaptureFixture) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        until("the frame", lambda: sum(node == "b" for node, _ in ring.frames) == 2)
        ring.numbers += 1
        again = next(frame for node, frame in reversed(ring.frames) if node == "b")
        ring.workers["b"].arrived(again)
    ring.numbers -= 1
    assert answers(ring, 2) == expected((1,), (2,))
    until("a word about it", lambda: "step 2 came twice or late" in caplog.text)  # it may be the second to arrive
    assert rows_of(ring, "b") == [1, 1]


def test_waiting_steps_of_an_epoch_that_is_given_up_are_dropped(ring_of: MakeRing) -> None:
    ring = ring_of(*THREE, streaming="b")
    with held_up(ring, "b"):
        ring.launch(2)
        ring.launch(3)
    ring.load(*THREE, epoch=FIRST.next(), streaming=["b"])
    number = ring.launch(9, epoch=FIRST.next())
    assert ring.collect().number == number
