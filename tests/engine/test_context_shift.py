"""A full context that shifts: the answer goes on, as if the shortened tokens had been the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prima_core.engine.engine import StepResult
from prima_core.engine.request import FinishReason, Piece, Request, Sampled, answer_tokens
from prima_core.engine.scheduler import Room
from prima_core.errors import ClusterError, RequestError
from tests.engine.fakes import Bench, KvLedger, chunks_of, kv_of, request

ROOM = Room(kv_tokens=40, chunk_tokens=4, max_sequences=8)


def shifting(room: Room = ROOM, context_length: int = 10) -> Bench:
    return Bench(room, context_length=context_length, context_shift=True)


def history(bench: Bench, number: int) -> str:
    return bytes(bench.so_far(number)).decode()


def test_generation_goes_on_beyond_the_context() -> None:
    bench = shifting()
    bench.submit(1, request("hello", 40))
    bench.run()
    end = bench.finished(1)
    assert (end.reason, end.n_prompt, end.n_generated) == (FinishReason.LENGTH, 5, 40)
    assert bench.text(1) == "abcdefghijklmnopqrstuvwxyzabcdefghijklmn"
    assert end.n_shifted == 35, "seven times, each time half of the ten tokens behind the first"


def test_the_first_token_and_the_newest_half_stay_and_are_computed_where_they_stand_now() -> None:
    bench = shifting()
    bench.submit(1, request("hello", 40))
    while len(bench.so_far(1)) < 11:
        bench.answer(bench.launched())
    assert history(bench, 1) == "helloabcdef"
    first, last = bench.launched(), bench.launched()
    assert kv_of(first) == [("move", 2)]
    assert (chunks_of(first), chunks_of(last)) == ([(2, 1, 5)], [(2, 5, 6)])
    assert bytes(bench.ledger.held[2]) == b"hbcdef"
    assert [want.index for want in last.wanted] == [6]


def test_so_much_of_the_begin_stays_as_is_asked_for() -> None:
    bench = shifting(context_length=12)
    bench.submit(1, replace(request("system: hi", 40), n_keep=4))
    while not (step := bench.launched()).step.kv or kv_of(step)[-1][0] != "move":
        bench.answer(step)
    assert history(bench, 1) == "system: hiabc"
    bench.answer(step)
    bench.launched()
    assert bytes(bench.ledger.held[2]) == b"syst" + b"hiabc"


def test_no_more_than_half_of_the_context_stays() -> None:
    bench = shifting(context_length=10)
    bench.submit(1, replace(request("12345678", 40), n_keep=8))
    bench.run()
    end = bench.finished(1)
    assert end.n_generated == 40
    assert bytes(next(iter(bench.ledger.held.values()))).startswith(b"12345")


@pytest.mark.parametrize("context_length", [1, 2, 3, 4, 5])
def test_the_smallest_contexts_shift(context_length: int) -> None:
    bench = shifting(context_length=context_length)
    bench.submit(1, request(1, 20))
    bench.run()
    assert bench.finished(1).n_generated == 20


def test_the_room_stays_the_same_and_others_go_on() -> None:
    bench = shifting(Room(kv_tokens=20, chunk_tokens=4, max_sequences=8))
    bench.submit(1, request("hello", 40))
    bench.submit(2, request("world", 30))
    bench.submit(3, request("waits", 3))
    bench.run()
    assert [bench.finished(number).n_generated for number in (1, 2, 3)] == [40, 30, 3]
    assert bench.engine.facts().kv_running == 0


def test_the_tokens_after_a_shift_are_those_of_a_fresh_request_with_the_shortened_ids() -> None:
    """A model whose next token depends on all tokens that it can see."""

    def serve(bench: Bench, wanted: Request, wait_for: int) -> list[int]:
        bench.submit(1, wanted)
        while bench.engine.facts().n_waiting or bench.engine.facts().running:
            planned = bench.launched()
            seen = {want.sequence: bench.ledger.held[planned.step.chunks[0].sequence] for want in planned.wanted}
            said = tuple((number, Sampled(1 + hash(tuple(ids)) % 200)) for number, ids in seen.items())
            bench.engine.accept(StepResult(planned.number, said))
        return [event.token for event in bench.events[1] if isinstance(event, Piece)][:wait_for]

    wanted = replace(request("hello", 20), ignore_eos=True)
    long = serve(shifting(), wanted, 20)
    context = [*wanted.prompt, *long[:6]]
    shortened = (*context[:1], *context[6:])
    fresh = serve(shifting(), replace(wanted, prompt=shortened, max_tokens=5), 5)
    assert long[6:11] == fresh


def test_a_prompt_longer_than_the_context_is_an_error_all_the_same() -> None:
    bench = shifting()
    bench.submit(1, request(10, 1000))
    with pytest.raises(RequestError, match=r"11 tokens.*has 10"):
        bench.submit(2, request(11, 1))


def test_without_it_nothing_beyond_the_context_is_taken() -> None:
    bench = Bench(ROOM, context_length=10)
    with pytest.raises(RequestError, match=r"5 tokens and 7.*has 10"):
        bench.submit(1, request(5, 7))


def test_a_request_that_was_cancelled_after_a_shift_leaves_its_present_tokens() -> None:
    bench = shifting()
    bench.submit(1, request("hello", 40))
    while len(bench.so_far(1)) < 14:
        bench.answer(bench.launched())
    bench.engine.cancel(1)
    assert list(map(bytes, bench.ledger.held.values())) == [b"hbcdefgh"]
    bench.submit(2, request("hbcdefgh", 2))
    bench.run()
    assert bench.finished(2).n_cached == 7


def test_a_shift_whose_step_fails_ends_the_request_and_leaves_nothing() -> None:
    bench = shifting()
    behind = KvLedger(ROOM)
    bench.submit(1, request("hello", 40))
    while True:
        step = bench.launched()
        if len(bench.so_far(1)) == 11:
            break
        behind.apply(step)
        bench.answer(step)
    broken = ClusterError("node 'b' is broken")
    bench.answer(step, broken)
    assert bench.failed(1) is broken
    cleaning = bench.launched()
    behind.apply(cleaning)
    assert behind.held == bench.ledger.held == {}


@pytest.mark.parametrize(
    ("wanted", "n_prompt", "shift", "n"),
    [
        (None, 10, False, 91),
        (5, 10, False, 5),
        (500, 10, False, 91),
        (None, 101, False, 0),
        (None, 10, True, 100),
        (500, 10, True, 500),
    ],
)
def test_how_many_tokens_an_answer_may_have(wanted: int | None, n_prompt: int, shift: bool, n: int) -> None:
    assert answer_tokens(wanted, n_prompt, 100, shift) == n
