"""The output part on another node than the head: wanted rows to it, logits back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.engine.engine import StepResult
from prima_core.engine.request import GREEDY
from prima_core.engine.scheduler import PlannedStep, Wanted
from prima_core.interfaces import Chunk, Step
from prima_core.plan.plan import Plan
from prima_core.ring import wire
from tests.ring.fakes import FIRST, SMALL, VOCAB, Ring, after, rows_for

MakeRing = Callable[..., Ring]


@pytest.mark.parametrize("output", ["head", "b", "c"])
@pytest.mark.parametrize(
    "visits",
    [
        [("head", 0, 6)],
        [("b", 0, 6)],
        [("b", 0, 2), ("c", 2, 6)],
        [("head", 0, 1), ("b", 1, 5), ("head", 5, 6)],
    ],
    ids=lambda visits: " ".join(f"{node}:{start}-{stop}" for node, start, stop in visits),
)
def test_the_output_part_may_be_on_any_node(ring_of: MakeRing, visits: list[tuple[str, int, int]], output: str) -> None:
    ring = ring_of("head", "b", "c")
    plan = ring.load(*visits, output=output)
    assert ring.answer(3, 11).tokens == ((3, after(3)), (11, after(11)))
    number = ring.launch(3, wants=False)
    assert ring.collect() == StepResult(number)
    ends = {
        name: (any(part.has_input for part in backend.parts), any(part.has_output for part in backend.parts))
        for name, backend in ring.backends.items()
    }
    assert ends == {name: (name == "head", name == output) for name in ring.backends}
    frames = [wire.decode(frame, limits_of(plan)) for _, frame in ring.frames]
    logits = [frame.activation.shape for frame in frames if frame.visit == len(visits) + 1]
    assert logits == ([] if output == "head" else [(2, VOCAB), (0, VOCAB)])


def limits_of(plan: Plan) -> wire.FrameLimits:
    vocab = 0 if plan.output_node == plan.head else VOCAB
    return wire.FrameLimits(FIRST, SMALL.spec.d_model, len(plan.visits), 1000, vocab_size=vocab)


def test_only_wanted_rows_go_to_the_output_part(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b", "c")
    plan = ring.load(("b", 0, 6), output="c")
    step = Step((Chunk(5, 0, 3), Chunk(9, 0, 2)), (), (5, 5, 7, 9, 9))
    wanted = (Wanted(2, 5, GREEDY, 0), Wanted(4, 9, GREEDY, 0))
    ring.workers["head"].launch(FIRST, PlannedStep(1, step, wanted))
    assert ring.collect().tokens == ((5, after(7)), (9, after(9)))
    assert [len(wire.decode(frame, limits_of(plan)).activation) for _, frame in ring.frames] == [5, 2, 2]


def test_what_fails_in_an_output_part_elsewhere_ends_its_step_alone(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b")
    ring.load(("head", 0, 6), output="b")
    ring.backends["b"].breaks["logits"] = ValueError("a bug")
    assert "node 'b': ValueError: a bug" in str(ring.answer(7).error)
    assert ring.works()


@pytest.mark.parametrize(
    ("node", "frame", "complaint"),
    [
        ("head", rows_for(2, 99, columns=VOCAB), "never launched"),
        ("head", rows_for(1, 99), "belongs to node 'b'"),
        ("head", rows_for(2, 99), "columns"),
        ("head", rows_for(2, 99, 1001, columns=VOCAB), "the plan allows 1000"),
        ("b", rows_for(2, 99, columns=VOCAB), "belongs to node 'head'"),
        ("b", rows_for(1, 99, columns=8), "columns"),
        ("b", rows_for(3, 99), "not one of the plan's"),
    ],
)
def test_rows_without_a_place_are_dropped_and_logged(
    ring_of: MakeRing, caplog: pytest.LogCaptureFixture, node: str, frame: bytes, complaint: str
) -> None:
    ring = ring_of("head", "b")
    ring.load(("head", 0, 6), output="b")
    ring.workers[node].arrived(memoryview(frame))
    assert ring.works()
    assert complaint in caplog.text


def test_logits_of_other_rows_than_were_wanted_are_dropped(ring_of: MakeRing, caplog: pytest.LogCaptureFixture) -> None:
    ring = ring_of("head", "b")
    ring.load(("head", 0, 6), output="b")
    forged = memoryview(rows_for(2, 1, 3, columns=VOCAB))

    def preceded_by_a_forged_frame(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        ring.workers["head"].arrived(forged)
        return logits

    ring.backends["b"].change_logits = preceded_by_a_forged_frame
    assert ring.works()
    assert "3 rows of step 1, 1 are wanted" in caplog.text
