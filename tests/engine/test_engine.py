"""The engine as a state machine: steps go out, results come in, events are delivered."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from prima_core.engine.engine import StepResult
from prima_core.engine.request import Failed, FinishReason, Piece, Request, Sampled, Sampling
from prima_core.engine.scheduler import PlannedStep, Room, Wanted
from prima_core.errors import ClusterError, FrameError, ModelError, PrimaError, RequestError
from prima_core.interfaces import Step
from tests.engine.fakes import EOS, ROOM, Bench, KvLedger, chunks_of, kv_of, letters, request

BROKEN = ClusterError("node 'b' is broken")


def says(text: str) -> Callable[[int, int], int]:
    """Every sequence says this, and then the end."""
    return lambda number, index: text.encode()[index] if index < len(text.encode()) else EOS


def submit_and_prefill(bench: Bench, *numbers: int) -> None:
    """Requests with prompts as long as their number, whose first tokens have come."""
    for number in numbers:
        bench.submit(number, request(number, max_tokens=4))
    for step in [bench.launched() for _ in numbers]:
        bench.answer(step)


def counts(bench: Bench) -> tuple[int, int]:
    """How many run and wait."""
    facts = bench.engine.facts()
    return len(facts.running), facts.n_waiting


# ---------------------------------------------------------------- what a step is made of


def test_a_prompt_goes_in_chunks_and_the_last_one_wants_a_token() -> None:
    bench = Bench()
    bench.submit(1, request(10))
    steps = [bench.launched() for _ in range(3)]
    assert [chunks_of(step) for step in steps] == [[(1, 0, 4)], [(1, 4, 8)], [(1, 8, 10)]]
    assert [step.wanted for step in steps] == [(), (), (Wanted(1, 1, Sampling(0.0), 0),)]


def test_chunks_of_a_prompt_do_not_wait_for_each_other_but_the_first_token_waits_for_all() -> None:
    bench = Bench()
    bench.submit(1, request(12))
    assert [bench.launch() is None for _ in range(4)] == [False, False, False, True]


def test_step_numbers_rise_by_one() -> None:
    bench = Bench()
    bench.submit(1, request(12))
    assert [bench.launched().number for _ in range(3)] == [1, 2, 3]


def test_a_step_carries_the_ids_of_its_tokens() -> None:
    bench = Bench()
    bench.submit(1, request("hello", max_tokens=2))
    carried = []
    for _ in range(3):
        step = bench.launched()
        bench.answer(step)
        carried.append(bytes(step.step.tokens))
    assert carried == [b"hell", b"o", b"a"]


def test_a_sequence_decodes_one_token_at_a_time() -> None:
    bench = Bench()
    bench.submit(1, request(1, max_tokens=4))
    bench.answer(bench.launched())
    step = bench.launched()
    assert chunks_of(step) == [(1, 1, 2)]
    assert step.wanted == (Wanted(0, 1, Sampling(0.0), 1),)
    assert bench.launch() is None
    bench.answer(step)
    assert chunks_of(bench.launched()) == [(1, 2, 3)]


def test_all_that_can_decode_go_together() -> None:
    bench = Bench()
    submit_and_prefill(bench, 1, 2, 3)
    step = bench.launched()
    assert chunks_of(step) == [(1, 1, 2), (2, 2, 3), (3, 3, 4)]
    assert [(want.row, want.sequence, want.index) for want in step.wanted] == [(0, 1, 1), (1, 2, 1), (2, 3, 1)]


def test_prefill_and_decode_take_turns() -> None:
    bench = Bench()
    bench.submit(1, request(1, max_tokens=20))
    bench.answer(bench.launched())
    bench.submit(2, request(16))
    kinds = []
    for _ in range(8):
        step = bench.launched()
        bench.answer(step)
        kinds.append({sequence for sequence, _, _ in chunks_of(step)})
    assert kinds == [{1}, {2}, {1}, {2}, {1}, {2}, {1}, {2}]


def test_prefill_goes_on_while_the_decode_step_is_in_flight() -> None:
    bench = Bench()
    bench.submit(1, request(1))
    bench.answer(bench.launched())
    bench.submit(2, request(12))
    kinds = [{sequence for sequence, _, _ in chunks_of(bench.launched())} for _ in range(4)]
    assert kinds == [{1}, {2}, {2}, {2}]


def test_the_index_of_a_wanted_token_does_not_depend_on_company() -> None:
    def wanted(company: int) -> list[Wanted]:
        bench, seen = Bench(), []
        for number in range(company):
            bench.submit(10 + number, request(5 + number, max_tokens=5))
        bench.submit(1, request(6, max_tokens=5, sampling=Sampling(seed=3)))
        while (step := bench.launch()) is not None:
            seen += [want for want in step.wanted if want.sequence == 1]
            bench.answer(step)
        return [Wanted(0, want.sequence, want.sampling, want.index) for want in seen]

    assert wanted(3) == wanted(0) == [Wanted(0, 1, Sampling(seed=3), index) for index in range(5)]


@pytest.mark.parametrize(
    ("sampling", "recent", "generated"),
    [
        (Sampling(), "", ""),
        (Sampling(repetition_penalty=1.1), "hello abc", ""),
        (Sampling(repetition_penalty=1.1, repetition_window=5), "o abc", ""),
        (Sampling(repetition_penalty=1.1, repetition_window=3), "abc", ""),
        (Sampling(repetition_penalty=1.1, repetition_window=0), "", ""),
        (Sampling(repetition_penalty=1.1, repetition_window=-1), "helo abc", ""),  # each once
        (Sampling(frequency_penalty=0.1), "", "abc"),
        (Sampling(presence_penalty=-0.1), "", "abc"),
        (Sampling(repetition_penalty=0.9, repetition_window=4, presence_penalty=1.0), " abc", "abc"),
    ],
    ids=str,
)
def test_a_wanted_token_brings_the_history_that_its_penalties_look_at(
    sampling: Sampling, recent: str, generated: str
) -> None:
    bench = Bench()
    bench.submit(1, request("hello ", max_tokens=4, sampling=sampling))
    wanted: tuple[Wanted, ...] = ()
    while (step := bench.launch()) is not None:
        bench.answer(step)
        wanted = step.wanted or wanted
    assert wanted == (Wanted(0, 1, sampling, 3, tuple(recent.encode()), Counter(generated.encode())),)


def test_the_end_is_banned_until_the_least_number_of_tokens_is_there() -> None:
    bench = Bench()
    bench.submit(1, request(1, max_tokens=5, min_tokens=3))
    banned = []
    while (step := bench.launch()) is not None:
        banned += [want.banned for want in step.wanted]
        bench.answer(step)
    assert banned == [(EOS,), (EOS,), (EOS,), (), ()]


# ---------------------------------------------------------------- who is let in


def test_what_does_not_fit_waits_and_nobody_overtakes_it() -> None:
    bench = Bench(Room(kv_tokens=10, chunk_tokens=16, max_sequences=8))
    bench.submit(1, request(5, max_tokens=2))  # 6 positions
    bench.submit(2, request(8, max_tokens=1))  # 8
    bench.submit(3, request(1, max_tokens=1))  # 1: would fit beside the first
    first = bench.launched()
    assert chunks_of(first) == [(1, 0, 5)]
    assert bench.launch() is None
    assert counts(bench) == (1, 2)
    bench.run()
    bench.answer(first)
    bench.run()
    assert [list(bench.events)[i] for i in range(3)] == [1, 2, 3]
    assert all(bench.finished(number).reason is FinishReason.LENGTH for number in (1, 2, 3))


def test_room_that_a_request_gives_back_is_used_in_the_same_step() -> None:
    bench = Bench(Room(kv_tokens=8, chunk_tokens=16, max_sequences=8))
    bench.submit(1, request("12345678", max_tokens=1))
    bench.submit(2, request("abcdefgh", max_tokens=1))
    bench.answer(bench.launched())
    assert kv_of(bench.launched()) == [("drop", 1), ("open", 2)]


def test_so_many_sequences_and_no_more() -> None:
    bench = Bench(Room(kv_tokens=100, chunk_tokens=16, max_sequences=2))
    for number in (1, 2, 3):
        bench.submit(number, request(1, max_tokens=2))
    bench.launch(), bench.launch()
    assert counts(bench) == (2, 1)


def test_a_sequence_takes_no_room_for_its_last_token() -> None:
    bench = Bench(Room(kv_tokens=10, chunk_tokens=16, max_sequences=1))
    bench.submit(1, request(8, max_tokens=3))
    bench.run()
    assert bench.finished(1).n_generated == 3


def test_a_sequence_is_opened_in_the_step_of_its_first_tokens() -> None:
    """So that it fails with this step and with no other one's."""
    bench = Bench()
    bench.submit(1, request(6))
    bench.submit(2, request(1))
    assert [kv_of(bench.launched()) for _ in range(3)] == [[("open", 1)], [], [("open", 2)]]


def test_when_nothing_is_left_to_compute_room_is_given_back_in_a_step_of_its_own() -> None:
    bench = Bench()
    bench.submit(1, request())
    bench.answer(bench.launched())
    bench.engine.fail([1], BROKEN)
    assert bench.engine.is_idle
    step = bench.launched()
    assert (step.step.chunks, kv_of(step), step.wanted) == ((), [("drop", 1)], ())
    assert not bench.engine.is_idle
    bench.answer(step)
    assert bench.engine.is_idle
    assert bench.launch() is None
    assert bench.ledger.held == {}


# ---------------------------------------------------------------- how a request ends


def test_max_tokens_end_it() -> None:
    bench = Bench()
    bench.submit(1, request(2, max_tokens=3))
    bench.run()
    end = bench.finished(1)
    assert (bench.text(1), end.reason, end.n_prompt, end.n_generated) == ("abc", FinishReason.LENGTH, 2, 3)


def test_the_end_token_ends_it_and_is_not_seen() -> None:
    bench = Bench(says=says("hi"))
    bench.submit(1, request(1, max_tokens=9))
    bench.run()
    assert (bench.text(1), bench.finished(1).reason) == ("hi", FinishReason.STOP)
    assert [event.token for event in bench.events[1] if isinstance(event, Piece)] == list(b"hi")


def test_the_end_token_does_not_end_what_shall_ignore_it() -> None:
    bench = Bench(says=says("hi"))
    bench.submit(1, request(1, max_tokens=4, ignore_eos=True))
    bench.run()
    assert (bench.text(1), bench.finished(1).reason, bench.finished(1).n_generated) == ("hi", FinishReason.LENGTH, 4)


def test_a_stop_string_across_tokens_ends_it_and_is_not_seen() -> None:
    bench = Bench(says=says("one STOP two"))
    bench.submit(1, request(1, max_tokens=50, stop=("STOP",)))
    bench.run()
    assert (bench.text(1), bench.finished(1).reason, bench.finished(1).n_generated) == ("one ", FinishReason.STOP, 8)


def test_a_stop_string_before_the_least_number_of_tokens_is_text() -> None:
    bench = Bench(says=says("STOP STOP"))
    bench.submit(1, request(1, max_tokens=50, stop=("STOP",), min_tokens=5))
    bench.run()
    assert (bench.text(1), bench.finished(1).n_generated) == ("STOP ", 9)


def test_text_that_was_held_back_comes_with_the_end() -> None:
    bench = Bench(says=says("one ST"))
    bench.submit(1, request(1, max_tokens=50, stop=("STOP",)))
    bench.run()
    assert (bench.finished(1).text, bench.text(1)) == ("ST", "one ST")


def test_every_token_brings_an_event_of_its_own() -> None:
    bench = Bench(says=says("gr\u00fcn"))
    bench.submit(1, request(1, max_tokens=5))
    bench.run()
    assert [event.text for event in bench.events[1] if not isinstance(event, Failed)] == [
        "g",
        "r",
        "",
        "\u00fc",
        "n",
        "",
    ]


# ---------------------------------------------------------------- cancelling


def cancelled_while_waiting(bench: Bench) -> PlannedStep | None:
    return None


def cancelled_in_its_prefill(bench: Bench) -> PlannedStep | None:
    return bench.launched()


def cancelled_in_its_last_chunk(bench: Bench) -> PlannedStep | None:
    bench.answer(bench.launched())
    return bench.launched()


def cancelled_between_tokens(bench: Bench) -> PlannedStep | None:
    bench.answer(bench.launched())
    bench.answer(bench.launched())
    return None


def cancelled_in_a_decode_step(bench: Bench) -> PlannedStep | None:
    cancelled_between_tokens(bench)
    return bench.launched()


@pytest.mark.parametrize(
    "come_so_far",
    [
        cancelled_while_waiting,
        cancelled_in_its_prefill,
        cancelled_in_its_last_chunk,
        cancelled_between_tokens,
        cancelled_in_a_decode_step,
    ],
)
def test_a_request_can_be_cancelled_at_every_point(come_so_far: Callable[[Bench], PlannedStep | None]) -> None:
    bench = Bench()
    bench.submit(1, request(8))
    in_flight = come_so_far(bench)
    bench.engine.cancel(1)
    assert bench.finished(1).reason is FinishReason.CANCELLED
    n_events = len(bench.events[1])
    if in_flight is not None:
        bench.answer(in_flight)
    bench.engine.cancel(1)
    bench.run()
    assert len(bench.events[1]) == n_events
    assert bench.engine.facts().kv_running == 0
    assert bench.engine.is_idle


@pytest.mark.parametrize("kv_tokens", [10, 100], ids=["it waits", "it was let in"])
def test_cancelling_what_was_never_launched_needs_no_step(kv_tokens: int) -> None:
    bench = Bench(Room(kv_tokens, chunk_tokens=4, max_sequences=8))
    bench.submit(1, request(4, max_tokens=7))
    bench.submit(2, request(4, max_tokens=7))
    bench.launch()
    bench.engine.cancel(2)
    assert bench.launch() is None


def test_cancelling_an_unknown_request_is_nothing() -> None:
    Bench().engine.cancel(7)


def test_the_room_of_a_cancelled_request_is_free_again() -> None:
    bench = Bench(Room(kv_tokens=10, chunk_tokens=16, max_sequences=8))
    bench.submit(1, request(10, max_tokens=1))
    bench.submit(2, request(10, max_tokens=1))
    bench.launch()
    bench.engine.cancel(1)
    bench.run()
    assert bench.finished(2).reason is FinishReason.LENGTH


# ---------------------------------------------------------------- faults


def test_a_failed_step_ends_its_own_sequences_only() -> None:
    bench = Bench()
    submit_and_prefill(bench, 1, 2)
    bench.submit(3, request(1, max_tokens=4))
    bench.answer(bench.launched(), BROKEN)  # the decode step of 1 and 2
    bench.run()
    assert bench.failed(1) is bench.failed(2) is BROKEN
    assert bench.text(3) == "abcd"
    assert list(bench.ledger.held) == [3]


def test_chunks_behind_a_failed_one_fail_in_silence() -> None:
    bench = Bench()
    bench.submit(1, request(12))
    steps = [bench.launched() for _ in range(3)]
    for step in steps:
        bench.answer(step, BROKEN)
    assert bench.failed(1) is BROKEN
    assert len(bench.events[1]) == 1


def test_what_a_failed_step_should_have_dropped_is_dropped_again() -> None:
    """It may not have reached the nodes behind the one that failed."""
    bench = Bench()
    bench.submit(1, request("a"))
    bench.answer(bench.launched(), BROKEN)
    bench.submit(2, request("b"))
    failing = bench.launched()
    assert kv_of(failing) == [("drop", 1), ("open", 2)]
    bench.answer(failing, BROKEN)
    assert kv_of(bench.launched()) == [("drop", 1), ("drop", 2)]


def test_a_step_that_only_drops_is_not_tried_again_for_ever() -> None:
    bench = Bench()
    bench.submit(1, request())
    bench.answer(bench.launched(), BROKEN)
    bench.answer(bench.launched(), BROKEN)
    assert bench.launch() is None
    bench.submit(2, request("else"))
    assert kv_of(bench.launched()) == [("drop", 1), ("open", 2)]


def test_a_row_that_cannot_be_sampled_ends_its_own_sequence_only() -> None:
    bench = Bench()
    submit_and_prefill(bench, 1, 2)
    wrong = ModelError("not finite")
    bench.engine.accept(StepResult(bench.launched().number, ((1, wrong), (2, Sampled(ord("z"))))))
    bench.run()
    assert bench.failed(1) is wrong
    assert bench.text(2) == "azcd"


def test_a_result_that_overtakes_shows_that_the_steps_before_it_were_lost() -> None:
    bench = Bench()
    bench.submit(1, request(1))
    bench.launched()
    bench.submit(2, request(1))
    bench.answer(bench.launched())
    bench.run()
    assert "lost" in str(bench.failed(1))
    assert bench.text(2) == "abc"
    assert bench.engine.is_idle
    assert list(bench.ledger.held) == [2]


def test_a_probe_finds_a_lost_step() -> None:
    bench = Bench()
    bench.submit(1, request(1))
    bench.launched()
    probe = bench.engine.probe()
    assert (probe.step, probe.wanted) == (Step(()), ())
    bench.answer(probe)
    assert isinstance(bench.failed(1), ClusterError)


def test_a_probe_behind_a_slow_step_hurts_nobody() -> None:
    bench = Bench()
    bench.submit(1, request(1))
    slow = bench.launched()
    probe = bench.engine.probe()
    bench.answer(slow)
    bench.answer(probe)
    bench.run()
    assert bench.text(1) == "abc"


def test_results_that_nobody_waits_for_are_ignored() -> None:
    bench = Bench()
    bench.submit(1, request(1))
    step = bench.launched()
    bench.engine.accept(StepResult(77, ((1, Sampled(ord("x"))),)))
    bench.answer(step)
    bench.answer(step)
    bench.run()
    assert bench.text(1) == "abc"


# ---------------------------------------------------------------- a new epoch


def test_a_restart_ends_what_runs_and_keeps_what_waits() -> None:
    bench = Bench(Room(kv_tokens=10, chunk_tokens=4, max_sequences=8))
    bench.submit(1, request(8))
    bench.submit(2, request(8))
    old = bench.launched()
    bench.ledger = KvLedger(bench.engine.room)
    bench.engine.restart(bench.engine.room, BROKEN)
    assert bench.failed(1) is BROKEN
    assert bench.events[2] == []
    bench.answer(old)  # of the old epoch
    bench.run()
    assert bench.text(2) == "abc"


def test_after_a_restart_nothing_of_before_is_dropped() -> None:
    bench = Bench()
    bench.submit(1, request(1, max_tokens=1))
    bench.answer(bench.launched())
    bench.engine.restart(ROOM, BROKEN)
    assert bench.launch() is None


def test_what_waits_and_can_never_fit_the_new_room_ends() -> None:
    bench = Bench(Room(kv_tokens=10, chunk_tokens=4, max_sequences=1))
    bench.submit(1, request(1))
    bench.submit(2, request(8))
    bench.submit(3, request(2))
    bench.launch()
    small = Room(kv_tokens=5, chunk_tokens=4, max_sequences=1)
    bench.ledger = KvLedger(small)
    bench.engine.restart(small, BROKEN)
    assert isinstance(bench.failed(2), RequestError)
    bench.run()
    assert bench.text(3) == "abc"


def test_stop_ends_everything() -> None:
    bench = Bench(Room(kv_tokens=5, chunk_tokens=4, max_sequences=8))
    bench.submit(1, request(3))
    bench.submit(2, request(3))
    bench.launch()
    bench.engine.stop(BROKEN)
    assert bench.failed(1) is bench.failed(2) is BROKEN


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wanted", "param", "message"),
    [
        (Request((), 1), "messages", "empty"),
        (Request((1, -1), 1), "messages", "token id -1"),
        (Request((1, 2**31), 1), "messages", "token id 2147483648"),
        (request(50, max_tokens=52), "max_tokens", r"50 tokens and 52.*has 100"),
        (request(90, max_tokens=12), "max_tokens", r"90 tokens and 12.*has 100"),
        (request(1, max_tokens=0), "max_tokens", "0"),
        (request(1, stop=("",)), "stop", "empty"),
        (request(1, sampling=Sampling(temperature=math.nan)), "temperature", "nan"),
        (request(1, sampling=Sampling(temperature=math.inf)), "temperature", "inf"),
        (request(1, sampling=Sampling(temperature=-1.0)), "temperature", "-1"),
        (request(1, sampling=Sampling(top_p=1.5)), "top_p", "1.5"),
        (request(1, sampling=Sampling(top_p=math.nan)), "top_p", "nan"),
        (request(1, sampling=Sampling(top_k=-1)), "top_k", "-1"),
        (request(1, sampling=Sampling(min_p=1.01)), "min_p", "1.01"),
        (request(1, sampling=Sampling(min_p=math.nan)), "min_p", "nan"),
        (request(1, sampling=Sampling(typical_p=-0.1)), "typical_p", "-0.1"),
        (request(1, sampling=Sampling(repetition_penalty=0.0)), "repetition_penalty", "0.0"),
        (request(1, sampling=Sampling(repetition_penalty=math.inf)), "repetition_penalty", "inf"),
        (request(1, sampling=Sampling(repetition_window=-2)), "repetition_window", "-2"),
        (request(1, sampling=Sampling(frequency_penalty=2.1)), "frequency_penalty", "2.1"),
        (request(1, sampling=Sampling(presence_penalty=-2.1)), "presence_penalty", "-2.1"),
        (request(1, sampling=Sampling(logprobs=21)), "top_logprobs", "21"),
        (request(1, sampling=Sampling(logprobs=-1)), "top_logprobs", "-1"),
        (request(1, sampling=Sampling(logit_bias=((256, 1.0),))), "logit_bias", "token 256.* has 256"),
        (request(1, sampling=Sampling(logit_bias=((-1, 1.0),))), "logit_bias", "token -1"),
        (request(1, sampling=Sampling(logit_bias=((1, 100.5),))), "logit_bias", "100.5 for token 1"),
        (request(1, sampling=Sampling(logit_bias=((1, math.nan),))), "logit_bias", "nan for token 1"),
        (request(1, sampling=Sampling(logit_bias=((1, 1.0),) * 1025)), "logit_bias", "1025 tokens"),
        (request(1, max_tokens=3, min_tokens=4), "min_tokens", "4"),
        (request(1, min_tokens=-1), "min_tokens", "-1"),
    ],
)
def test_a_request_that_can_never_run_is_refused(wanted: Request, param: str, message: str) -> None:
    bench = Bench(context_length=100)
    with pytest.raises(RequestError, match=message) as caught:
        bench.submit(1, wanted)
    assert caught.value.param == param
    assert (counts(bench), bench.launch()) == ((0, 0), None)


def test_a_request_for_more_than_the_cluster_holds_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"needs 101 KV positions.*for 100"):
        Bench().submit(1, request(99))


def test_a_request_of_just_the_context_is_taken() -> None:
    bench = Bench(context_length=100)
    bench.submit(1, request(50, max_tokens=51))
    bench.run()
    assert bench.finished(1).n_generated == 51


# ---------------------------------------------------------------- anything in any order


class Chaos:
    """A ring that is two nodes long: a step may fail between them, and is then seen by the first node only."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        room = Room(kv_tokens=40, chunk_tokens=4, max_sequences=3)
        self.bench = Bench(room, self._say, context_length=24 if seed % 2 else 1000, context_shift=bool(seed % 2))
        self.behind = KvLedger(self.bench.engine.room, boundless=True)
        self.in_flight: list[PlannedStep] = []
        self.numbers = 0
        self.faults = 1.0

    def _say(self, number: int, index: int) -> int:
        return EOS if self.rng.random() < 0.05 else letters(number, index)

    def act(self) -> None:
        actions = [self.submit, self.launch, self.launch, self.launch, self.collect, self.collect, self.cancel]
        self.rng.choice(actions)()
        if self.rng.random() < 0.01:
            self.restart()

    def submit(self) -> None:
        self.numbers += 1
        base = self.rng.choice(["", "p" * 20, self._earlier()])
        prompt = base[: self.rng.randint(0, 16)] + self.rng.choice(["", "x", "zzzz"])
        wanted = request(prompt or "p", max_tokens=self.rng.randint(1, 15))
        self.bench.submit(self.numbers, replace(wanted, reuse_prefix=self.rng.random() < 0.9))

    def _earlier(self) -> str:
        """A conversation to go on with."""
        if self.numbers < 2:
            return ""
        return bytes(self.bench.so_far(self.rng.randint(max(1, self.numbers - 6), self.numbers - 1))).decode()

    def launch(self) -> bool:
        planned = self.bench.launch() if len(self.in_flight) < 4 else None
        if planned is not None:
            self.in_flight.append(planned)
        return planned is not None

    def collect(self) -> None:
        if len(self.in_flight) > 1 and self.rng.random() < 0.02 * self.faults:
            del self.in_flight[0]  # it was lost
        if self.in_flight:
            planned = self.in_flight.pop(0)
            self.bench.answer(planned, self._through(planned))

    def _through(self, planned: PlannedStep) -> PrimaError | None:
        """A step fails before the second node, or at it (because one before it failed), or behind it."""
        fails = self.rng.random() < 0.05 * self.faults
        if fails and self.rng.random() < 0.5:
            return BROKEN
        try:
            self.behind.apply(planned)
        except FrameError:
            return BROKEN
        self.bench.check_held(self.behind, planned)
        return BROKEN if fails else None

    def cancel(self) -> None:
        if self.rng.random() < 0.3 and self.numbers:
            self.bench.engine.cancel(self.rng.randint(1, self.numbers))

    def restart(self) -> None:
        room = Room(kv_tokens=self.rng.choice([35, 40, 60]), chunk_tokens=4, max_sequences=3)
        self.bench.engine.restart(room, BROKEN)
        self.bench.ledger, self.behind = KvLedger(room), KvLedger(room, boundless=True)
        self.in_flight.clear()

    def settle(self) -> None:
        """No more faults; one more request, because what can wait travels with tokens."""
        self.faults = 0.0
        self.submit()
        while self.launch() or self.in_flight:
            self.collect()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_request_ends_once_and_all_room_comes_back(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(400):
        chaos.act()
    chaos.settle()
    assert chaos.bench.engine.is_idle
    facts = chaos.bench.engine.facts()
    assert facts.running == ()
    assert chaos.behind.held == chaos.bench.ledger.held, "what a failed step did not do everywhere was made good"
    assert (len(chaos.behind.held), chaos.behind.reserved) == (facts.n_kept, facts.kv_kept)
    for number, events in chaos.bench.events.items():
        assert chaos.bench.has_ended(number)
        assert all(isinstance(event, Piece) for event in events[:-1])
