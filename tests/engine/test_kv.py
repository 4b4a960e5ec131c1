"""KV that outlives its request: what is reused, what it costs, and what goes when memory is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from prima_core.engine.kv import MAX_AGAIN
from prima_core.engine.request import FinishReason
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import ClusterError, PrimaError
from prima_core.interfaces import KvKind
from tests.engine.fakes import ROOM, Bench, KvLedger, chunks_of, kv_of, request

BROKEN = ClusterError("node 'b' is broken")
WIDE = Room(kv_tokens=100, chunk_tokens=64, max_sequences=8)
CONVERSATION = "you are a helpful pirate. hello!"


def ask(bench: Bench, number: int, prompt: str, max_tokens: int = 3, reuse_prefix: bool = True) -> list[PlannedStep]:
    """The steps of a request that is served alone."""
    bench.submit(number, replace(request(prompt, max_tokens), reuse_prefix=reuse_prefix))
    steps = []
    while (planned := bench.launch()) is not None:
        steps.append(planned)
        bench.answer(planned)
    return steps


def n_cached(bench: Bench, *numbers: int) -> list[int]:
    return [bench.finished(number).n_cached for number in numbers]


def capacities(bench: Bench) -> list[int]:
    return list(bench.ledger.capacities.values())


# ---------------------------------------------------------------- what is found


def test_a_prompt_is_computed_from_where_it_differs() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, "the quick fox", 3)
    first, *_ = ask(bench, 2, "the quack", 3)
    assert chunks_of(first) == [(2, 6, 9)]
    assert n_cached(bench, 1, 2) == [0, 6]
    assert bench.text(2) == "abc"


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, "hello", 4)
    first, *_ = ask(bench, 2, "hello" + "abcd" + "more", 4)
    assert chunks_of(first) == [(2, 8, 13)], "the last token of the answer was never in the model"
    assert n_cached(bench, 2) == [8]


def test_at_least_one_token_is_computed() -> None:
    bench = Bench(WIDE)
    for number in (1, 2, 3):
        ask(bench, number, "hello", 3)
    assert n_cached(bench, 1, 2, 3) == [0, 4, 4]


def test_the_longest_of_several_beginnings_is_taken() -> None:
    bench = Bench(WIDE)
    for number, prompt in enumerate(["one two three", "one two", "one", "one tw"], 1):
        ask(bench, number, prompt, 1, reuse_prefix=False)
    ask(bench, 9, "one two thr, and so on", 1)
    assert n_cached(bench, 9) == [11]


def test_tokens_that_are_launched_can_be_reused_before_they_are_collected() -> None:
    bench = Bench(WIDE)
    bench.submit(1, request("a long story", 3))
    bench.submit(2, request("a long stormy night", 3))
    steps = [bench.launched(), bench.launched()]
    assert [chunks_of(step) for step in steps] == [[(1, 0, 12)], [(2, 11, 19)]]
    for step in steps:
        bench.answer(step)
    bench.run()
    assert n_cached(bench, 1, 2) == [0, 11]
    assert bench.text(1) == bench.text(2) == "abc"


def test_choices_of_one_prompt_compute_it_once() -> None:
    bench = Bench(Room(kv_tokens=400, chunk_tokens=4, max_sequences=8))
    for number in range(1, 6):
        bench.submit(number, request(30, max_tokens=4))
    bench.run()
    assert n_cached(bench, *range(1, 6)) == [0, 29, 29, 29, 29]
    assert {bench.text(number) for number in range(1, 6)} == {"abcd"}


def test_prompts_are_launched_in_the_order_in_which_they_came() -> None:
    bench = Bench(Room(kv_tokens=400, chunk_tokens=4, max_sequences=8))
    prompts = ["one, two, three", "one, two, four", "else", "one, two, three"]
    for number, prompt in enumerate(prompts, 1):
        bench.submit(number, request(prompt, max_tokens=2))
    launched = [bench.launched() for _ in range(7)]
    assert [chunk[0] for step in launched for chunk in chunks_of(step)] == [1, 1, 1, 1, 2, 3, 4]


def test_who_asks_to_compute_everything_gets_it_and_others_may_use_it() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, "hello", 3)
    ask(bench, 2, "hello", 3, reuse_prefix=False)
    ask(bench, 3, "hello", 3)
    assert n_cached(bench, 1, 2, 3) == [0, 0, 4]


def test_a_cancelled_request_leaves_what_it_launched() -> None:
    bench = Bench(ROOM)
    bench.submit(1, request("twelve bytes", 3))
    steps = [bench.launched(), bench.launched()]
    bench.engine.cancel(1)
    for step in steps:
        bench.answer(step)
    ask(bench, 2, "twelve bytes more", 3)
    assert n_cached(bench, 2) == [8]


def test_of_a_request_that_was_cancelled_before_its_first_step_nothing_is_kept() -> None:
    bench = Bench(ROOM)
    bench.submit(1, request("twelve bytes", 3))
    bench.engine.cancel(1)
    assert bench.launch() is None
    assert bench.engine.facts().n_kept == 0


# ---------------------------------------------------------------- what it costs


def test_a_conversation_goes_on_in_its_own_room() -> None:
    """As large as all memory, and no second one is needed."""
    bench = Bench(Room(kv_tokens=40, chunk_tokens=64, max_sequences=4))
    said = "hello"
    for turn in range(1, 6):
        max_tokens = 41 - len(said)  # what the context has left
        bench.submit(turn, request(said, max_tokens))
        bench.answer(bench.launched())
        bench.answer(bench.launched())
        bench.engine.cancel(turn)
        said += bench.text(turn) + "!"
    assert n_cached(bench, *range(1, 6)) == [0, 6, 9, 12, 15]
    assert capacities(bench) == [40]


def test_a_source_is_copied_from_while_there_is_room_for_both() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, CONVERSATION + "aye", 5)
    first, *_ = ask(bench, 2, CONVERSATION + "nay", 5)
    assert [op.kind for op in first.step.kv] == [KvKind.FORK]
    assert capacities(bench) == [39, 39]


def test_what_is_most_of_a_source_is_taken_over_rather_than_that_others_go() -> None:
    bench = Bench(Room(kv_tokens=60, chunk_tokens=64, max_sequences=8))
    ask(bench, 1, "something else", 5)
    ask(bench, 2, CONVERSATION + "aye", 5)
    first, *_ = ask(bench, 3, CONVERSATION + "nay", 5)
    assert kv_of(first) == [("move", 3)]
    ask(bench, 4, "something else again", 5)
    assert n_cached(bench, 3, 4) == [len(CONVERSATION), 14]


def test_what_is_little_of_a_source_is_copied_though_others_go() -> None:
    bench = Bench(Room(kv_tokens=60, chunk_tokens=64, max_sequences=8))
    ask(bench, 1, "something else", 5)
    ask(bench, 2, CONVERSATION, 5)
    first, *_ = ask(bench, 3, "you do not help", 5)
    assert kv_of(first) == [("drop", 1), ("fork", 3)]


def test_where_there_is_no_room_beside_it_even_little_of_a_source_is_taken_over() -> None:
    bench = Bench(Room(kv_tokens=40, chunk_tokens=64, max_sequences=8))
    ask(bench, 1, CONVERSATION, 5)
    first, *_ = ask(bench, 2, "you do not help", 5)
    assert kv_of(first) == [("move", 2)]


def test_with_as_many_sequences_as_there_may_be_a_source_is_taken_over() -> None:
    bench = Bench(Room(kv_tokens=100, chunk_tokens=64, max_sequences=1))
    ask(bench, 1, CONVERSATION, 5)
    first, *_ = ask(bench, 2, "you do not help", 5)
    assert kv_of(first) == [("move", 2)]


def test_kept_room_shrinks_before_anything_goes() -> None:
    bench = Bench(Room(kv_tokens=70, chunk_tokens=64, max_sequences=8))
    ask(bench, 1, "0123456789", 20)
    for number, prompt in ((2, "abcdefghij"), (3, "ABCDEFGHIJ")):
        bench.submit(number, request(prompt, 20))
        bench.answer(bench.launched())
        bench.engine.cancel(number)
    assert capacities(bench) == [29, 10, 29], "1 has written all of its room, 2 has not, 3 was not asked to shrink"
    assert n_cached(bench, 1, 2, 3) == [0, 0, 0]


def test_who_ended_first_goes_first() -> None:
    bench = Bench(Room(kv_tokens=30, chunk_tokens=64, max_sequences=8))
    for number, prompt in enumerate(["1111111111", "2222222222", "3333333333"], 1):
        ask(bench, number, prompt, 1)
    ask(bench, 4, "1111111111", 1)  # takes the place of 1, and is the youngest now
    ask(bench, 5, "5555555555", 1)
    ask(bench, 6, "1111111111+", 1)
    assert n_cached(bench, 4, 5, 6) == [9, 0, 10]
    assert bench.engine.facts().n_kept == 2


def test_kept_sequences_are_not_more_than_sequences_may_be() -> None:
    bench = Bench(Room(kv_tokens=100, chunk_tokens=64, max_sequences=3))
    for number in range(1, 8):
        ask(bench, number, f"{number} is a number", 1)
    assert len(bench.ledger.held) == bench.engine.facts().n_kept == 3


def test_what_begins_a_younger_one_is_not_kept_beside_it() -> None:
    bench = Bench(WIDE)
    for number in (1, 2, 3, 4):
        ask(bench, number, "the same again", 5)
    assert bench.engine.facts().n_kept == 1


def test_nothing_is_lost_for_a_request_that_cannot_run_yet() -> None:
    bench = Bench(Room(kv_tokens=60, chunk_tokens=64, max_sequences=8))
    ask(bench, 1, "something else", 5)
    bench.submit(2, request("runs", 30))
    running = bench.launched()
    bench.submit(3, request("a prompt that waits", 30))
    assert bench.launch() is None
    assert bench.engine.facts().n_kept == 1
    bench.answer(running)
    bench.run()
    assert bench.finished(3).reason is FinishReason.LENGTH


# ---------------------------------------------------------------- faults


def test_of_a_failed_request_nothing_is_kept() -> None:
    bench = Bench(WIDE)
    bench.submit(1, request("hello", 3))
    bench.answer(bench.launched(), BROKEN)
    ask(bench, 2, "hello", 3)
    assert n_cached(bench, 2) == [0]


def test_what_a_failed_step_took_over_is_gone() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, "hello", 3)
    bench.submit(2, request("helloab, and on", 3))
    moved = bench.launched()
    assert kv_of(moved) == [("move", 2)]
    bench.answer(moved, BROKEN)
    step = bench.launched()
    assert kv_of(step) == [("drop", 1), ("drop", 2)]
    bench.answer(step)
    ask(bench, 3, "hello", 3)
    assert n_cached(bench, 3) == [0]


def test_what_shrank_in_a_failed_step_is_gone_everywhere() -> None:
    """Some nodes shrank it and some did not."""
    bench = Bench(Room(kv_tokens=60, chunk_tokens=64, max_sequences=8))
    bench.submit(1, request("0123456789", 40))
    bench.answer(bench.launched())
    bench.engine.cancel(1)
    bench.submit(2, request("abcdefghij", 40))
    failing = bench.launched()
    assert kv_of(failing) == [("move", 1), ("open", 2)]
    bench.answer(failing, BROKEN)
    assert kv_of(bench.launched()) == [("drop", 1), ("drop", 2)]
    assert bench.engine.facts().n_kept == 0


def test_a_source_that_failed_in_flight_is_not_used_again() -> None:
    """It was cancelled, and then a step of it failed."""
    bench = Bench(ROOM)
    bench.submit(1, request("twelve bytes", 3))
    steps = [bench.launched(), bench.launched()]
    bench.engine.cancel(1)
    bench.answer(steps[0])
    bench.answer(steps[1], BROKEN)
    ask(bench, 2, "twelve bytes more", 3)
    assert n_cached(bench, 2) == [0]
    assert 1 not in bench.ledger.held


def test_a_sequence_with_tokens_in_flight_does_not_shrink() -> None:
    """A step of it may yet fail, and then that of another one, which it shrank in, would too."""
    bench = Bench(Room(kv_tokens=60, chunk_tokens=64, max_sequences=8))
    bench.submit(1, request("0123456789", 40))
    bench.launched()
    bench.engine.cancel(1)
    bench.submit(2, request("abcdefghij", 40))
    assert kv_of(bench.launched()) == [("drop", 1), ("open", 2)]


def test_a_fork_of_what_fails_fails_at_the_node_that_lacks_it_and_not_silently() -> None:
    bench = Bench(ROOM)
    behind = KvLedger(ROOM, boundless=True)
    bench.submit(1, request("twelve bytes", 3))
    bench.submit(2, request("twelve bytes, or so", 3))
    results: list[tuple[PlannedStep, PrimaError | None]] = []
    for count, step in enumerate([bench.launched() for _ in range(4)]):
        try:
            behind.apply(step) if count != 1 else None
            results.append((step, None if count != 1 else BROKEN))
        except PrimaError as error:
            results.append((step, error))
    for step, fault in results:
        bench.answer(step, fault)
    bench.run()
    assert bench.failed(1) is BROKEN
    assert "longer than its source" in str(bench.failed(2))


def test_however_many_steps_fail_in_a_row_the_next_one_fits_a_frame_and_all_is_dropped() -> None:
    bench = Bench(ROOM)
    stale = KvLedger(ROOM, boundless=True)  # of a node that saw the first operations only
    for number in range(1, 2 * MAX_AGAIN):
        bench.submit(number, request("hello", 3))
        step = bench.launched()
        assert len(step.step.kv) <= MAX_AGAIN + 2
        stale.held[number], stale.capacities[number] = [], 7
        bench.answer(step, BROKEN)
    while (planned := bench.launch()) is not None:
        stale.apply(planned)
        bench.answer(planned)
    assert (stale.held, bench.ledger.held) == ({}, {})


def test_a_new_epoch_forgets_everything() -> None:
    bench = Bench(WIDE)
    ask(bench, 1, "hello", 3)
    bench.engine.restart(WIDE, BROKEN)
    bench.ledger = KvLedger(WIDE)
    ask(bench, 2, "hello", 3)
    assert n_cached(bench, 2) == [0]


# ---------------------------------------------------------------- facts


def test_the_facts_tell_what_memory_is_used_for() -> None:
    bench = Bench(Room(kv_tokens=60, chunk_tokens=4, max_sequences=3))
    ask(bench, 1, "hello", 3)
    bench.submit(2, request("hello, you", 5))
    bench.submit(3, request("unlike that", 50))
    bench.launched()
    facts = bench.engine.facts()
    assert (facts.n_waiting, facts.n_kept, facts.max_sequences) == (1, 1, 3)
    assert (facts.kv_tokens, facts.kv_running, facts.kv_kept) == (60, 14, 7)
    (running,) = facts.running
    assert (running.number, running.is_prefilling, running.n_cached, running.n_computed) == (2, True, 5, 9)


@pytest.mark.parametrize("length", [1, 2, 64, 5000])
def test_prompts_of_every_length_are_compared(length: int) -> None:
    def prompts(last: Sequence[int]) -> tuple[int, ...]:
        return (*(index % 200 + 1 for index in range(length)), *last)

    bench = Bench(Room(kv_tokens=20000, chunk_tokens=4096, max_sequences=8), context_length=10000)
    bench.submit(1, replace(request(), prompt=prompts((7, 8))))
    bench.run()
    bench.submit(2, replace(request(), prompt=prompts((9,))))
    bench.run()
    assert n_cached(bench, 2) == [length]
