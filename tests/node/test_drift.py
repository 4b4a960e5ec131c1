"""Nodes that serve otherwise than they were measured are named."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from prima_core.engine.facts import EngineFacts, SequenceFacts
from prima_core.events import RequestDone
from prima_core.node.drift import DriftWatch
from prima_core.node.driver import Relearned, State, Status
from prima_core.node.member import Member
from prima_core.plan.forecast import Forecast, NodeForecast
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import DeviceFacts, LinkFacts
from prima_core.ring.times import NodeTimes

TOKEN_S = 0.1
FORECAST = Forecast(
    0.25, 0.2, None, 512, 1, "computing", tuple(NodeForecast(name, TOKEN_S, 0, 0, 0, 0, 0, 0) for name in "ab")
)
PLAN = Plan(4, "a", (Visit("a", 0, 2), Visit("b", 2, 4)), forecast=FORECAST)
MEMBERS = (Member("a", 1000, (), "", 1e9, "m 8:0"), Member("b", 1000, (), "", 1e9, "m 8:0"), Member("c", 1, (), ""))
STATUS = Status(State.SERVING, plan=PLAN, members=MEMBERS)
ONE = EngineFacts((SequenceFacts(1, False, 10, 10, 0, 20, 0, 100),))


class Watch:
    """A watch over node b, which steps as it is told to."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.learned: list[Relearned] = []
        self.watch = DriftWatch(self.told.append, self.learned.append)
        self.times = NodeTimes()

    def goes(
        self, n_steps: int, step_s: float, width: int = 1, engine: EngineFacts = ONE, status: Status = STATUS
    ) -> tuple[str, ...]:
        """In reports of five steps each."""
        for _ in range(0, n_steps, 5):
            now = self.times
            self.times = NodeTimes(
                compute_s=now.compute_s + 5 * step_s, n_steps=now.n_steps + 5, n_tokens=now.n_tokens + 5 * width
            )
            self.watch.see("b", self.times, status, engine)
        return self.watch.off("b")


@pytest.mark.parametrize("step_s", [0.76 * TOKEN_S, TOKEN_S, 1.24 * TOKEN_S])
def test_a_node_that_is_about_as_fast_as_foretold_is_not_named(step_s: float) -> None:
    seen = Watch()
    assert seen.goes(200, step_s) == ()
    assert seen.told == []


@pytest.mark.parametrize("step_s", [0.7 * TOKEN_S, 1.3 * TOKEN_S])
def test_a_node_that_computes_otherwise_is_named_once(step_s: float) -> None:
    seen = Watch()
    [said] = seen.goes(200, step_s)
    assert said == f"computes a token in {1e3 * step_s:.1f} ms; 100.0 ms were foretold"
    assert seen.told == [f"node b {said}"]


def test_what_has_mended_is_no_longer_off() -> None:
    seen = Watch()
    assert len(seen.goes(100, 2 * TOKEN_S)) == 1
    assert seen.goes(100, TOKEN_S) == ()
    assert len(seen.goes(100, 2 * TOKEN_S)) == 1
    assert len(seen.told) == 1


def test_a_node_that_was_busy_for_a_moment_is_not_named_in_the_log() -> None:
    seen = Watch()
    seen.goes(10, TOKEN_S)
    for _ in "abc":
        assert len(seen.goes(35, 2 * TOKEN_S)) == 1
        assert seen.goes(70, TOKEN_S) == ()
    assert seen.told == []


def test_plans_learn_how_fast_a_node_is_and_when_that_has_passed() -> None:
    seen = Watch()
    seen.goes(200, 2 * TOKEN_S)
    [news] = seen.learned
    assert news.name == "b"
    assert news.times == pytest.approx(0.5)
    assert news.plan is PLAN
    seen.goes(200, TOKEN_S)
    assert seen.learned[-1] == Relearned("b", 1.0, plan=PLAN)


def test_plans_do_not_learn_what_was_so_for_a_moment() -> None:
    seen = Watch()
    seen.goes(10, TOKEN_S)
    for _ in "abc":
        seen.goes(35, 2 * TOKEN_S)
        seen.goes(70, TOKEN_S)
    assert seen.learned == []


def test_a_node_whose_rates_are_guesses_is_not_held_to_them() -> None:
    guessed = replace(MEMBERS[1], devices=(DeviceFacts("numpy:cpu", 1000),))
    seen = Watch()
    assert seen.goes(200, 2 * TOKEN_S, status=replace(STATUS, members=(MEMBERS[0], guessed))) == ()
    assert seen.learned == []


def test_a_few_late_steps_are_no_drift() -> None:
    assert Watch().goes(30, 3 * TOKEN_S) == ()


def test_steps_of_many_tokens_are_not_held_against_a_node() -> None:
    seen = Watch()
    assert seen.goes(200, 9 * TOKEN_S, width=64) == ()
    assert seen.goes(5, 9 * TOKEN_S) == (), "a part of a wide step may have come after it was counted"
    assert seen.goes(200, TOKEN_S) == ()


@pytest.mark.parametrize(
    "running",
    [
        (SequenceFacts(1, False, 10, 10, 0, 20, 0, 100), SequenceFacts(2, False, 10, 10, 0, 20, 0, 100)),
        (SequenceFacts(1, False, 9000, 10, 0, 9010, 0, 9100),),
    ],
    ids=["several answers", "a long one"],
)
def test_steps_that_are_not_as_forecasts_take_them_to_be_do_not_count(running: tuple[SequenceFacts, ...]) -> None:
    assert Watch().goes(200, 2 * TOKEN_S, engine=EngineFacts(running)) == ()


def test_another_plan_begins_anew() -> None:
    seen = Watch()
    seen.goes(30, 2 * TOKEN_S)
    other = Status(State.SERVING, plan=Plan(4, "a", PLAN.visits, forecast=FORECAST), members=MEMBERS)
    assert seen.goes(30, 2 * TOKEN_S, status=other) == ()


@pytest.mark.parametrize("plan", [None, Plan(4, "a", PLAN.visits)], ids=["no plan", "no forecast"])
def test_where_nothing_was_foretold_nothing_is_off(plan: Plan | None) -> None:
    assert Watch().goes(200, 9.0, status=Status(State.SERVING, plan=plan, members=MEMBERS)) == ()


def test_a_node_that_was_lost_is_forgotten() -> None:
    seen = Watch()
    seen.goes(100, 2 * TOKEN_S)
    seen.watch.lost("b")
    assert seen.watch.off("b") == ()
    assert len(seen.goes(100, 2 * TOKEN_S)) == 1
    assert len(seen.told) == 2, "it may be another machine by now"


# ---------------------------------------------------------------- links, disks and answers

LINK = LinkFacts("a", "b", 0.003, 4e7)


def test_a_link_that_is_off_twice_is_named_once() -> None:
    told: list[str] = []
    watch = DriftWatch(told.append, lambda news: None)
    assert watch.see_link(LINK, 0.004, 0.008), "to be looked at once more"
    assert (watch.off("a"), told) == ((), [])
    assert not watch.see_link(LINK, 0.004, 0.008)
    assert watch.off("a") == ("sends a token to b in 8.0 ms; 4.0 ms were measured when they met",)
    assert not watch.see_link(LINK, 0.004, 0.009)
    assert told == ["node a sends a token to b in 8.0 ms; 4.0 ms were measured when they met"]
    watch.lost("b")
    assert watch.off("a") == ()


@pytest.mark.parametrize(("before_s", "now_s"), [(0.004, 0.0049), (0.0001, 0.0009), (0.02, 0.016)])
def test_links_may_vary(before_s: float, now_s: float) -> None:
    watch = DriftWatch(lambda line: None, lambda news: None)
    for _ in range(3):
        assert not watch.see_link(LINK, before_s, now_s)
    assert watch.off("a") == ()


@pytest.mark.parametrize(("before_s", "now_s"), [(0.004, 0.0), (0.0, 0.004)])
def test_a_link_that_was_or_is_quicker_than_can_be_measured_is_learned_as_very_quick(
    before_s: float, now_s: float
) -> None:
    learned: list[Relearned] = []
    watch = DriftWatch(lambda line: None, learned.append)
    link = LinkFacts("a", "b", before_s, 1e8)
    for _ in range(2):
        watch.see_link(link, before_s, now_s)
    [news] = learned
    assert news.link is not None
    assert news.link.latency_s == pytest.approx(now_s, abs=1e-5)
    assert news.link.bytes_s > 0


def test_a_link_that_has_mended_is_no_longer_off() -> None:
    learned: list[Relearned] = []
    watch = DriftWatch(lambda line: None, learned.append)
    for now_s in (0.02, 0.02):
        watch.see_link(LINK, 0.004, now_s)
    assert len(watch.off("a")) == 1
    slower = msgspec.structs.replace(LINK, latency_s=5 * LINK.latency_s, bytes_s=LINK.bytes_s / 5)
    assert learned == [Relearned("a", link=slower)]
    assert not watch.see_link(LINK, 0.004, 0.004)
    assert watch.off("a") == ()
    assert learned[1:] == [Relearned("a", link=LINK)]
    watch.see_link(LINK, 0.004, 0.004)
    assert len(learned) == 2


def test_a_link_that_stays_off_is_news_only_when_it_has_changed() -> None:
    learned: list[Relearned] = []
    watch = DriftWatch(lambda line: None, learned.append)
    for now_s in (0.008, 0.008, 0.0081, 0.0085, 0.0079, 0.016, 0.0165):
        watch.see_link(LINK, 0.004, now_s)
    assert [news.link.latency_s for news in learned if news.link] == pytest.approx([0.006, 0.012])
    watch.lost("b")
    for _ in "ab":
        watch.see_link(LINK, 0.004, 0.016)
    assert len(learned) == 3, "the node may be another one by now"


def disk(*reads: tuple[float, float], name: str = "b") -> tuple[tuple[str, ...], list[str]]:
    """What is off after reads of so many bytes in so many seconds."""
    told: list[str] = []
    watch, n_bytes, reading_s = DriftWatch(told.append, lambda news: None), 0.0, 0.0
    for size, seconds in reads:
        n_bytes, reading_s = n_bytes + size, reading_s + seconds
        watch.see(name, NodeTimes(read_bytes=round(n_bytes), reading_s=reading_s), STATUS, ONE)
    return watch.off(name), told


@pytest.mark.parametrize(
    ("n_bytes", "reading_s", "is_slow"),
    [(1.4e9, 4.0, True), (1.6e9, 4.0, False), (4e9, 4.0, False), (1e6, 1.0, False)],
    ids=["slow", "about its share", "all of it", "hardly anything was read"],
)
def test_a_disk_that_gives_less_than_its_share_is_named(n_bytes: float, reading_s: float, is_slow: bool) -> None:
    assert disk((n_bytes, reading_s))[1] == [], "it may have been busy for a moment"
    off, told = disk((n_bytes, reading_s), (n_bytes, reading_s))
    assert off == (("reads its weights at 350 MB/s; 500 MB/s were measured",) if is_slow else ())
    assert told == [f"node b {said}" for said in off]


def test_a_disk_is_judged_by_what_was_read_last() -> None:
    assert disk((2e9, 4.0), (1e9, 4.0)) == (("reads its weights at 250 MB/s; 500 MB/s were measured",), [])
    assert disk((1e9, 4.0), (2e9, 4.0))[0] == ()


def test_a_disk_that_was_not_measured_is_not_slow() -> None:
    assert disk((1.0, 100.0), name="c") == ((), [])


def done(n_tokens: int, token_s: float) -> RequestDone:
    return RequestDone("1", 10, n_tokens, "stop", 1.0, 1.0 + (n_tokens - 1) * token_s)


@pytest.mark.parametrize(
    ("answer", "engine", "is_told"),
    [
        (done(100, 0.5), ONE, True),
        (done(100, 0.3), ONE, False),
        (done(10, 0.5), ONE, False),
        (done(3000, 0.5), ONE, False),
        (done(100, 0.5), EngineFacts(ONE.running * 2), False),
    ],
    ids=["slow", "as foretold", "short", "long", "not alone"],
)
def test_answers_that_take_longer_than_foretold_are_told(
    answer: RequestDone, engine: EngineFacts, is_told: bool
) -> None:
    told: list[str] = []
    watch = DriftWatch(told.append, lambda news: None)
    watch.answered(answer, FORECAST, engine)
    watch.answered(answer, None, engine)
    assert told == [], "another program may have been at work"
    for _ in "ab":
        watch.answered(answer, FORECAST, engine)
    assert told == (["an answer took 500.0 ms per token, 250.0 ms were foretold (`prima ps` shows for what)"][:is_told])
