"""Which steps can be run as one, and that nothing of it is seen from outside."""

from __future__ import annotations

import numpy as np
import pytest

from prima_core.interfaces import Chunk, KvKind, KvOp, Step
from prima_core.ring.gather import Gather, Joined, Passing, row_bytes
from prima_core.testing.driving import step_of
from tests.arch.small import small_spec


def taken(*steps: Step, max_rows: int = 100) -> list[bool]:
    gather = Gather(max_rows)
    return [gather.take(step) for step in steps]


def empty(*kv: KvOp) -> Step:
    return Step((), kv)


OPEN_7 = KvOp(KvKind.OPEN, 7, capacity=9)


# ---------------------------------------------------------------- what goes along


def test_chunks_of_a_prompt_go_together() -> None:
    assert taken(step_of(1, range(4), 0), step_of(1, range(4), 4), step_of(1, range(2), 8)) == [True, True, True]


def test_steps_of_others_may_come_in_between() -> None:
    assert taken(step_of(1, range(4)), step_of(2, [5], 30), step_of(1, range(4), 4)) == [True, True, True]


@pytest.mark.parametrize("start", [3, 5], ids=["again", "with a gap"])
def test_chunks_that_do_not_follow_each_other_do_not_go_together(start: int) -> None:
    assert taken(step_of(1, range(4)), step_of(1, range(4), start)) == [True, False]


def test_rows_are_bounded_but_for_a_first_step_that_has_more_alone() -> None:
    assert taken(step_of(1, range(9)), step_of(2, [1]), step_of(3, [1]), max_rows=10) == [True, True, False]
    assert taken(step_of(1, range(20)), step_of(2, [1]), max_rows=10) == [True, False]


@pytest.mark.parametrize(
    "operation",
    [
        OPEN_7,
        KvOp(KvKind.FORK, 7, length=2, capacity=9, source=3),
        KvOp(KvKind.MOVE, 7, length=2, capacity=9, source=3),
        KvOp(KvKind.DROP, 7),
        KvOp(KvKind.DROP, 7, source=1),  # it has no source
    ],
    ids=lambda operation: operation.kind.value,
)
def test_changes_of_the_kv_of_others_go_along(operation: KvOp) -> None:
    assert taken(step_of(1, range(4)), step_of(7, [1], kv=[operation])) == [True, True]


@pytest.mark.parametrize(
    "operation",
    [
        KvOp(KvKind.FORK, 7, length=2, capacity=9, source=1),
        KvOp(KvKind.MOVE, 7, length=2, capacity=9, source=1),
        KvOp(KvKind.MOVE, 1, length=2, capacity=9, source=1),
        KvOp(KvKind.DROP, 1),
    ],
    ids=lambda operation: operation.kind.value,
)
def test_changes_of_kv_that_rows_of_the_gather_are_written_to_wait(operation: KvOp) -> None:
    assert taken(step_of(1, range(4)), empty(operation)) == [True, False]


def test_steps_without_rows_go_along() -> None:
    assert taken(empty(OPEN_7), empty(KvOp(KvKind.DROP, 7)), step_of(1, [1]), empty()) == [True] * 4


# ---------------------------------------------------------------- as one


def passing(*steps: Step) -> list[Passing]:
    """Each row holds its sequence, and its position."""
    rows = [[[chunk.sequence, chunk.start + i] for chunk in step.chunks for i in range(chunk.count)] for step in steps]
    return [
        Passing(number, step, np.array(own, np.float32).reshape(-1, 2))
        for number, (step, own) in enumerate(zip(steps, rows, strict=True))
    ]


STEPS = (
    step_of(1, [10, 11], 4, kv=[OPEN_7]),
    Step((Chunk(2, 9, 1), Chunk(3, 5, 1)), (), (20, 30)),
    empty(KvOp(KvKind.DROP, 9)),
    step_of(1, [12, 13, 14], 6),
    step_of(7, [70], 0),
)


def test_a_sequence_is_one_chunk_and_changes_keep_their_order() -> None:
    joined = Joined(passing(*STEPS))
    assert joined.step.chunks == (Chunk(1, 4, 5), Chunk(2, 9, 1), Chunk(3, 5, 1), Chunk(7, 0, 1))
    assert joined.step.kv == (OPEN_7, KvOp(KvKind.DROP, 9))
    assert joined.step.tokens == (10, 11, 12, 13, 14, 20, 30, 70)


def test_rows_go_with_their_chunks_and_come_back_in_turn() -> None:
    steps = passing(*STEPS)
    joined = Joined(steps)
    activation = joined.activation()
    assert activation is not None
    assert activation.tolist() == [[1, 4], [1, 5], [1, 6], [1, 7], [1, 8], [2, 9], [3, 5], [7, 0]]
    back = joined.in_turn(activation)
    for one, first in zip(steps, joined.starts(), strict=True):
        assert np.array_equal(back[first : first + one.step.n_tokens], one.activation)  # type: ignore[arg-type]


def test_one_step_alone_is_not_touched() -> None:
    (one,) = passing(STEPS[1])
    joined = Joined([one])
    assert joined.step is one.step
    assert joined.activation() is one.activation
    assert joined.in_turn(one.activation) is one.activation  # type: ignore[arg-type]


def test_steps_without_rows_join() -> None:
    joined = Joined(passing(empty(OPEN_7), empty(KvOp(KvKind.DROP, 9))))
    assert joined.step == empty(OPEN_7, KvOp(KvKind.DROP, 9))
    activation = joined.activation()
    assert activation is not None
    assert joined.in_turn(activation).shape == (0, 2)


def test_before_the_input_part_there_is_no_activation() -> None:
    assert Joined([Passing(1, STEPS[0]), Passing(2, STEPS[1])]).activation() is None


def test_a_row_takes_its_activations_in_a_block() -> None:
    spec = small_spec()
    assert row_bytes(spec) == 8 * (spec.d_model + spec.d_ff)
