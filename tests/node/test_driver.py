"""The driver as a state machine: nodes come, load, fail and go; requests come at any time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from prima_core.engine.engine import StepResult
from prima_core.engine.facts import SequenceFacts
from prima_core.engine.request import Failed, Finished, FinishReason
from prima_core.engine.scheduler import Room
from prima_core.errors import Busy, ClusterError, PluginError, PrimaError, RequestError
from prima_core.events import NodeJoined, NodeLost, PlanMade
from prima_core.node.driver import IDLE_S, PROBE_AFTER_S, Joined, Lost, Relearned, State, Submit
from prima_core.node.member import Member
from prima_core.node.running import LOAD_STALLS_AFTER_S
from prima_core.plan.plan import Plan
from prima_core.plan.problem import LinkFacts
from prima_core.ring.reports import Collected, Ready, Unreachable
from prima_core.ring.wire import Epoch
from tests.engine.fakes import kv_of, request
from tests.node.fakes import LAYER_BYTES, Rig, plan_for


def serving(*names: str, **options: int) -> Rig:
    """A rig whose nodes have joined and are ready."""
    rig = Rig(wait_for=len(names), **options)
    rig.join(*names)
    rig.ready()
    assert rig.state() is State.SERVING
    return rig


# ---------------------------------------------------------------- from nothing to serving


def test_it_waits_for_so_many_nodes_and_says_so() -> None:
    rig = Rig(wait_for=3)
    rig.join("head", "b")
    assert (rig.state(), rig.nodes.assigned) == (State.WAITING, [])
    assert "2 of 3" in rig.driver.status.reason


def test_the_last_node_starts_the_first_plan() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    assert rig.state() is State.LOADING
    assert rig.visited() == ("head", "b")
    assert rig.nodes.assigned[0][2] == {"head": "inproc://head", "b": "inproc://b"}


def test_it_serves_when_every_node_of_the_plan_is_ready() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.ready("b")
    assert rig.state() is State.LOADING
    rig.ready("head")
    assert rig.state() is State.SERVING
    assert rig.driver.status.plan == rig.plan_now


def test_progress_is_told_of_nodes_that_still_load() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.progress("head", 1, 4)
    rig.progress("b", 3, 4)
    assert rig.driver.status.progress == {"head": 0.25, "b": 0.75}
    rig.progress("b", 1 << 63, 4)
    assert rig.driver.status.progress["b"] == 1.0, "whatever it says"
    rig.ready("b")
    assert rig.driver.status.progress == {"head": 0.25}


def test_a_node_without_weights_to_load_is_no_division_by_zero() -> None:
    rig = Rig()
    rig.join("head")
    rig.progress("head", 0, 0)
    assert rig.driver.status.progress == {"head": 0.0}


def test_plugins_are_told_of_nodes_and_plans() -> None:
    rig = serving("head", "b")
    rig.lose("b", "it left")
    assert [type(event) for event in rig.emitted] == [NodeJoined, NodeJoined, PlanMade, NodeLost]
    assert rig.emitted[-1] == NodeLost("b", "it left")


def test_every_plan_has_an_epoch_of_its_own() -> None:
    rig = serving("head", "b")
    first = rig.epoch
    rig.lose("b")
    assert rig.epoch == Epoch(first.run_id, first.counter + 1)


# ---------------------------------------------------------------- requests in each state


def test_while_it_waits_for_nodes_requests_are_refused_with_the_reason() -> None:
    rig = Rig(wait_for=2)
    rig.join("head")
    rig.submit(1, request())
    assert isinstance(rig.failed(1), ClusterError)
    assert "1 of 2" in str(rig.failed(1))


def test_while_it_loads_requests_wait_and_are_served_then() -> None:
    rig = Rig()
    rig.join("head")
    rig.submit(1, request())
    assert (rig.events[1], rig.nodes.launched) == ([], [])
    rig.ready()
    rig.collect_all()
    assert rig.text(1) == "abc"


def test_while_it_serves_requests_are_served() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    rig.submit(2, request())
    rig.collect_all()
    assert (rig.text(1), rig.text(2)) == ("abc", "abc")


def test_after_stop_requests_are_refused() -> None:
    rig = serving("head")
    rig.stop("the server is stopping")
    rig.submit(1, request())
    assert "stopping" in str(rig.failed(1))


def test_a_request_that_can_never_run_fails_alone() -> None:
    rig = serving("head")
    rig.submit(1, request(1000, max_tokens=1000))
    rig.submit(2, request())
    rig.collect_all()
    assert isinstance(rig.failed(1), RequestError)
    assert rig.text(2) == "abc"


def test_not_more_steps_are_in_flight_than_the_plan_says() -> None:
    rig = serving("head", "b")
    rig.submit(1, request(40))
    assert len(rig.nodes.launched) == rig.plan_now.credit == 3
    rig.collect(*rig.nodes.launched[0])
    assert len(rig.nodes.launched) == 4


def test_a_cancelled_request_ends_and_its_tokens_are_kept() -> None:
    rig = serving("head")
    rig.submit(1, request(4))
    epoch, step = rig.nodes.launched.pop()
    rig.cancel(1)
    rig.collect(epoch, step)
    assert [type(event) for event in rig.events[1]] == [Finished]
    assert rig.nodes.launched == []
    facts = rig.driver.engine_facts
    assert (facts.running, facts.n_kept) == ((), 1)


def test_when_a_step_has_failed_room_is_given_back() -> None:
    rig = serving("head")
    rig.submit(1, request())
    rig.collect(*rig.nodes.launched.pop(), ClusterError("broken"))
    ((_, last),) = rig.nodes.launched
    assert (last.step.chunks, kv_of(last)) == ((), [("drop", 1)])


def test_what_the_engine_does_can_be_read_from_outside() -> None:
    rig = serving("head")
    rig.submit(1, request(3, max_tokens=2))
    rig.submit(2, request(3, max_tokens=2))
    rig.collect(*rig.nodes.launched.pop(0))
    facts = rig.driver.engine_facts
    second = SequenceFacts(2, False, n_prompt=3, n_generated=0, n_cached=2, n_computed=3, n_shifted=0, capacity=4)
    assert (facts.running[1], facts.n_waiting, facts.n_kept) == (second, 0, 0)
    assert (facts.kv_tokens, facts.kv_running, facts.kv_kept) == (100, 8, 0)
    rig.collect_all()
    facts = rig.driver.engine_facts
    assert (facts.running, facts.kv_running, facts.kv_kept) == ((), 0, 4), "both said the same"


def test_when_too_many_wait_the_next_one_is_told_so() -> None:
    rig = serving("head", max_waiting=2)
    rig.room = Room(kv_tokens=5, chunk_tokens=4, max_sequences=1)
    rig.lose("head")
    rig.join("head")
    rig.ready()
    for number in (1, 2, 3, 4):
        rig.submit(number, request(2))
    assert isinstance(rig.failed(4), Busy)
    rig.collect_all()
    assert [rig.text(number) for number in (1, 2, 3)] == ["abc"] * 3


# ---------------------------------------------------------------- nodes that go


def test_a_lost_node_of_the_plan_ends_what_runs_and_the_others_go_on() -> None:
    rig = serving("head", "b", "c")
    rig.submit(1, request())
    rig.lose("b", "nothing was heard of it for 2.5 s")
    assert "node 'b' was lost: nothing was heard" in str(rig.failed(1))
    assert rig.visited() == ("head", "c")
    rig.ready()
    rig.submit(2, request())
    rig.nodes.launched.pop(0)  # the step of 1, which nobody answers any more
    rig.collect_all()
    assert rig.text(2) == "abc"


def test_a_lost_node_that_is_not_in_the_plan_changes_nothing() -> None:
    rig = serving("head", "b")
    rig.join("c")
    rig.ready()
    rig.refuse("c")
    rig.ready()
    rig.submit(1, request())
    n_assigned = len(rig.nodes.assigned)
    rig.lose("c")
    assert len(rig.nodes.assigned) == n_assigned
    rig.collect_all()
    assert rig.text(1) == "abc"


def test_losing_a_node_that_was_never_there_is_nothing() -> None:
    rig = serving("head")
    rig.lose("x")
    assert (rig.state(), len(rig.nodes.assigned), len(rig.emitted)) == (State.SERVING, 1, 2)


def test_a_node_that_is_lost_while_it_loads_is_left_out() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.submit(1, request())
    old = rig.epoch
    rig.ready("head")
    rig.lose("b")
    assert (rig.state(), rig.visited()) == (State.LOADING, ("head",))
    rig.report("head", Ready(old))
    assert rig.state() is State.LOADING, "the head has to load its new part"
    rig.ready("head")
    rig.collect_all()
    assert rig.text(1) == "abc", "it waited"


def test_when_no_plan_fits_any_more_new_requests_hear_why_and_waiting_ones_wait() -> None:
    rig = serving("head", "b", needs=2)
    rig.room = Room(kv_tokens=5, chunk_tokens=4, max_sequences=1)
    rig.lose("b")
    rig.join("b")
    rig.ready()
    rig.submit(1, request(2))  # runs
    rig.submit(2, request(2))  # waits
    rig.nodes.launched.clear()
    rig.lose("b")
    assert rig.state() is State.WAITING
    assert "node 'b' was lost" in str(rig.failed(1))
    assert rig.events[2] == []
    rig.submit(3, request())
    assert "not memory enough" in str(rig.failed(3))
    rig.join("b")
    assert rig.events[2] == []
    rig.ready()
    rig.collect_all()
    assert rig.text(2) == "abc"


def test_what_can_never_fit_what_is_left_ends() -> None:
    rig = serving("head", "b")
    rig.room = Room(kv_tokens=50, chunk_tokens=4, max_sequences=1)
    rig.submit(1, request(1, max_tokens=20))
    rig.submit(2, request(60))
    rig.submit(3, request(1, max_tokens=80))
    rig.nodes.launched.clear()
    rig.lose("b")
    assert isinstance(rig.failed(1), ClusterError)
    assert isinstance(rig.failed(2), ClusterError)


def test_waiting_requests_that_can_never_fit_the_new_room_end_with_both_numbers() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.submit(1, request(60))
    rig.room = Room(kv_tokens=50, chunk_tokens=4, max_sequences=1)
    rig.lose("b")
    assert "needs 62 KV positions" in str(rig.failed(1))
    assert "for 50" in str(rig.failed(1))


def test_a_first_plan_may_wait_for_many_but_the_next_goes_on_with_few() -> None:
    rig = serving("head", "b", "c")
    rig.lose("b")
    rig.lose("c")
    rig.ready()
    assert rig.state() is State.SERVING


# ---------------------------------------------------------------- nodes that cannot


def test_a_node_that_cannot_load_is_left_out_until_it_joins_again() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.refuse("b", "the model was not found")
    assert rig.visited() == ("head",)
    rig.ready()
    rig.join("c")
    assert rig.visited() == ("head", "c"), "still without b"
    assert [member.name for member in rig.driver.fit_members] == ["head", "c"], "nor is it told what b would give"
    rig.ready()
    rig.lose("b")
    rig.join("b")
    rig.ready()
    assert rig.visited() == ("head", "c", "b")


def test_when_nothing_goes_without_it_its_reason_is_told() -> None:
    rig = Rig(wait_for=2, needs=2)
    rig.join("head", "b")
    rig.refuse("b", "the model was not found")
    assert rig.state() is State.WAITING
    assert "not memory enough" in rig.driver.status.reason
    assert "'b' cannot serve: the model was not found" in rig.driver.status.reason


@pytest.mark.parametrize("memory_bytes", [40, 500])
def test_where_a_device_has_less_memory_than_it_said_the_next_plan_knows(memory_bytes: int) -> None:
    """It counts with less than the last plan took, whatever the device says, so that it comes to an end."""
    rig = serving("head", "b")
    rig.submit(1, request())
    rig.join("c")
    rig.collect_all()
    rig.run_short("b", memory_bytes)
    [b] = [member for member in rig.driver.status.members if member.name == "b"]
    assert b.devices[0].memory_bytes == min(memory_bytes, LAYER_BYTES - 1)
    assert rig.visited() == ("head", "c")
    rig.ready()
    assert rig.state() is State.SERVING


def test_when_no_plan_fits_the_memory_that_is_left_the_reason_is_told() -> None:
    rig = Rig(wait_for=2, needs=2)
    rig.join("head", "b")
    rig.run_short("b", 40)
    assert rig.state() is State.WAITING
    assert "not memory enough" in rig.driver.status.reason
    assert "'b': 0 of the layers would fit" in rig.driver.status.reason
    rig.lose("b")
    rig.join("b")
    assert rig.state() is State.LOADING, "who joins again says anew what it has"


def test_a_node_that_names_a_device_on_which_nothing_was_planned_is_left_out() -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.run_short("b", 500, device="sun:gpu")
    assert rig.visited() == ("head",)


def test_a_node_that_takes_no_frames_of_another_is_left_out() -> None:
    rig = serving("head", "b", "c")
    rig.submit(1, request())
    rig.report("b", Unreachable(rig.epoch, "c", ClusterError("no connection to c")))
    assert rig.visited() == ("head", "b")
    assert "'c' cannot serve: no connection to c" in str(rig.failed(1))


@pytest.mark.parametrize("accused", ["nobody", "b", "c"])
def test_a_node_that_complains_about_one_to_which_it_sends_nothing_is_left_out_itself(accused: str) -> None:
    rig = serving("head", "b", "c", "d")
    rig.report("c", Unreachable(rig.epoch, accused, ClusterError("no connection")))
    assert rig.visited() == ("head", "b", "d")


def test_a_node_without_devices_that_cannot_load_is_left_out_instead_of_asked_for_ever() -> None:
    class Nameless(Rig):
        def plan(self, members: tuple[Member, ...]) -> Plan:
            plan = super().plan(members)
            needs = tuple(msgspec.structs.replace(need, device="") for need in plan.residency)
            return msgspec.structs.replace(plan, residency=needs)

    rig = Nameless(wait_for=2)
    rig.join("head", "b")
    rig.refuse("b")
    assert rig.visited() == ("head",)


def test_a_node_that_cannot_reach_the_head_is_left_out_itself() -> None:
    rig = serving("head", "b", "c")
    rig.report("c", Unreachable(rig.epoch, "head", ClusterError("no connection")))
    assert rig.visited() == ("head", "b")


# ---------------------------------------------------------------- late nodes


def test_a_late_node_enters_when_nothing_runs() -> None:
    rig = serving("head")
    rig.join("b")
    assert rig.visited() == ("head", "b")
    rig.ready()
    assert rig.state() is State.SERVING


def test_a_late_node_waits_for_the_running_requests_and_for_what_is_in_flight() -> None:
    rig = serving("head")
    rig.submit(1, request(1, max_tokens=2))
    rig.join("b")
    rig.collect(*rig.nodes.launched.pop(0))
    assert len(rig.nodes.assigned) == 1
    rig.collect(*rig.nodes.launched.pop(0))
    assert isinstance(rig.events[1][-1], Finished)
    assert len(rig.nodes.assigned) == 2, "idle: all is collected, and the new plan needs no drops of the old KV"
    assert rig.nodes.launched == []


def test_requests_that_wait_for_room_go_on_in_the_larger_cluster() -> None:
    rig = Rig()
    rig.room = Room(kv_tokens=5, chunk_tokens=4, max_sequences=1)
    rig.join("head")
    rig.ready()
    rig.submit(1, request(2))
    rig.submit(2, request(2))
    rig.join("b")
    rig.collect_all()
    assert rig.text(1) == "abc"
    assert rig.visited() == ("head", "b")
    assert rig.events[2] == []
    rig.ready()
    rig.collect_all()
    assert rig.text(2) == "abc"


def test_a_node_that_comes_while_others_load_enters_when_they_are_ready() -> None:
    rig = Rig()
    rig.join("head")
    rig.join("b")
    assert rig.visited() == ("head",)
    rig.ready("head")
    assert rig.visited() == ("head", "b")
    assert rig.state() is State.LOADING


def test_a_late_node_that_the_plan_does_not_use_disturbs_nobody() -> None:
    rig = serving("head")
    plan = rig.plan_now
    rig.plan = lambda members: plan  # type: ignore[method-assign]  # this planner knows one answer only
    rig.driver._planner = rig.plan
    rig.join("b")
    assert (rig.state(), len(rig.nodes.assigned)) == (State.SERVING, 1)


@pytest.mark.parametrize("error", [ClusterError("it does not fit"), PluginError("solver 'x' failed")], ids=str)
def test_a_late_node_for_which_no_plan_is_found_leaves_the_present_one(error: PrimaError) -> None:
    rig = serving("head")
    rig.broken_planner = error
    rig.join("b")
    assert rig.state() is State.SERVING
    rig.submit(1, request())
    rig.collect_all()
    assert rig.text(1) == "abc"


def test_a_solver_that_is_broken_from_the_start_is_the_reason_for_waiting() -> None:
    rig = Rig()
    rig.broken_planner = PluginError("solver 'x' failed at solve")
    rig.join("head")
    assert (rig.state(), rig.driver.status.reason) == (State.WAITING, "solver 'x' failed at solve")


def test_a_node_that_joins_again_is_first_lost_and_then_let_in() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    rig.lose("b", "it joined again")
    assert "it joined again" in str(rig.failed(1))
    rig.join("b")
    rig.ready()
    assert rig.visited() == ("head", "b")


# ---------------------------------------------------------------- epochs


def test_results_of_an_old_epoch_are_ignored() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    old_epoch, old = rig.nodes.launched.pop()
    rig.lose("b")
    rig.ready()
    rig.submit(2, request(8))
    rig.collect(old_epoch, old)
    rig.report("head", Collected(old_epoch, StepResult(rig.nodes.launched[0][1].number, error=ClusterError("old"))))
    rig.collect_all()
    assert rig.text(2) == "abc"


@pytest.mark.parametrize("epoch", [Epoch(7, 1), Epoch(7, 99), Epoch(8, 3)], ids=str)
@pytest.mark.parametrize("kind", [Ready, lambda epoch: Unreachable(epoch, "b", ClusterError("old"))])
def test_reports_of_another_epoch_are_ignored(epoch: Epoch, kind: Callable[[Epoch], Ready | Unreachable]) -> None:
    rig = Rig(wait_for=2)
    rig.join("head", "b")
    rig.lose("b")
    rig.join("b")
    n_assigned = len(rig.nodes.assigned)
    rig.report("head", kind(epoch))
    assert (rig.state(), len(rig.nodes.assigned)) == (State.LOADING, n_assigned)


# ---------------------------------------------------------------- steps that never come back


def lost_in_a_ring_that_is_quiet(rig: Rig) -> None:
    rig.now_s += PROBE_AFTER_S + 1
    rig.driver.tick()


def test_a_step_that_never_comes_back_is_found_by_an_empty_one_behind_it() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    rig.nodes.launched.clear()  # lost on the way
    lost_in_a_ring_that_is_quiet(rig)
    ((epoch, probe),) = rig.nodes.launched
    assert probe.step.chunks == ()
    rig.nodes.launched.clear()
    rig.collect(epoch, probe)
    assert "lost" in str(rig.failed(1))
    rig.submit(2, request())
    rig.collect_all()
    assert rig.text(2) == "abc"


def test_lost_probes_are_followed_by_others_but_not_without_bound() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    for _ in range(100):
        lost_in_a_ring_that_is_quiet(rig)
    assert 2 < len(rig.nodes.launched) <= 2 * rig.plan_now.credit


def test_a_ring_that_is_only_slow_is_left_alone() -> None:
    rig = serving("head", "b")
    rig.submit(1, request())
    for _ in range(3):
        lost_in_a_ring_that_is_quiet(rig)
    rig.collect_all()
    assert rig.text(1) == "abc"


@pytest.mark.parametrize("passed_s", [0.0, PROBE_AFTER_S - 0.1])
def test_a_ring_that_moves_is_not_probed(passed_s: float) -> None:
    rig = serving("head")
    rig.submit(1, request(1, max_tokens=50))
    for _ in range(5):
        rig.now_s += passed_s
        rig.driver.tick()
        assert len(rig.nodes.launched) == 1
        rig.collect(*rig.nodes.launched.pop())


def test_results_that_come_one_by_one_are_movement() -> None:
    rig = serving("head", "b")
    rig.submit(1, request(12))
    steps = list(rig.nodes.launched)
    assert len(steps) == 3
    for epoch, step in steps[:2]:
        rig.now_s += PROBE_AFTER_S - 1
        rig.collect(epoch, step)
        rig.driver.tick()
    assert rig.nodes.launched == steps


def test_an_idle_or_loading_cluster_is_not_probed() -> None:
    rig = Rig()
    rig.join("head")
    lost_in_a_ring_that_is_quiet(rig)
    rig.ready()
    lost_in_a_ring_that_is_quiet(rig)
    assert rig.nodes.launched == []


# ---------------------------------------------------------------- the end


def test_stop_ends_what_runs_and_what_waits() -> None:
    rig = Rig()
    rig.join("head")
    rig.submit(1, request())
    rig.ready()
    rig.submit(2, request())
    rig.stop("good night")
    assert rig.state() is State.STOPPED
    assert str(rig.failed(1)) == str(rig.failed(2)) == "good night"


def test_after_stop_nodes_that_leave_start_no_new_plan() -> None:
    rig = serving("head", "b")
    rig.stop()
    rig.lose("b")
    rig.join("c")
    assert (rig.state(), len(rig.nodes.assigned)) == (State.STOPPED, 1)


def test_the_thread_takes_messages_until_it_is_stopped() -> None:
    rig = Rig()
    rig.driver.start()
    rig.driver.inbox.put(Joined(Member("head", 1000, (), "inproc://head")))
    events: list[object] = []
    rig.driver.inbox.put(Submit(1, request(), events.append))
    rig.driver.stop(ClusterError("bye"))
    assert not rig.driver._thread.is_alive()
    assert [type(event) for event in events] == [Failed]
    rig.driver.stop(ClusterError("again"))


def test_a_driver_that_fails_ends_all_requests_and_refuses_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.join("head", "b")
    rig.submit(1, request())
    rig.broken_planner = ZeroDivisionError("a bug")  # type: ignore[assignment]  # what no planner should raise
    rig.driver.start()
    rig.driver.inbox.put(Lost("head", "it left"))
    rig.driver.inbox.put(Submit(2, request(), rig.events.setdefault(2, []).append))
    rig.driver.stop(ClusterError("bye"))
    assert not rig.driver._thread.is_alive()
    for number in (1, 2):
        assert "the server failed: ZeroDivisionError: a bug" in str(rig.failed(number))
    assert "the driver failed" in caplog.text


def test_reasons_of_cancelled_requests_are_told() -> None:
    rig = serving("head")
    rig.submit(1, request())
    rig.cancel(1)
    (end,) = rig.events[1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.CANCELLED


# ---------------------------------------------------------------- what was measured while serving


def other_plan() -> Plan:
    return plan_for(["head"])


def test_when_rates_have_changed_and_nobody_asks_a_better_plan_is_looked_for_and_followed() -> None:
    rig = serving("head", "b")
    before, rig.better_plan = rig.plan_now, other_plan()
    rig.relearn("b", 0.5)
    rig.passes(IDLE_S - 1)
    assert rig.asked_for_better == []
    rig.passes(2)
    [(plan, members)] = rig.asked_for_better
    assert plan == before
    assert [member.devices[0].decode_bytes_s for member in members] == [1e9, 5e8]
    assert rig.state() is State.LOADING
    assert rig.visited() == ("head",)


def test_without_news_no_other_plan_is_looked_for() -> None:
    rig = serving("head", "b")
    rig.passes(2 * IDLE_S)
    rig.relearn("b", 1.0)
    rig.passes(2 * IDLE_S)
    assert rig.asked_for_better == []


def test_while_requests_run_the_plan_stays() -> None:
    rig = serving("head", "b")
    rig.better_plan = other_plan()
    rig.submit(1, request())
    rig.relearn("b", 0.5)
    rig.passes(1)  # whoever asks moves the moment on
    rig.passes(2 * IDLE_S)
    assert rig.asked_for_better == []
    rig.collect_all()
    assert rig.text(1) == "abc"
    rig.passes(IDLE_S - 1)
    assert rig.asked_for_better == []
    rig.passes(2)
    assert len(rig.asked_for_better) == 1


def test_where_no_plan_is_better_the_present_one_stays_and_is_asked_about_once() -> None:
    rig = serving("head", "b")
    epoch = rig.epoch
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    assert len(rig.asked_for_better) == 1
    assert (rig.state(), rig.epoch) == (State.SERVING, epoch)


def test_a_solver_that_breaks_over_news_leaves_the_plan_alone() -> None:
    rig = serving("head", "b")
    rig.broken_planner = PluginError("broken")
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    assert rig.state() is State.SERVING


def test_how_much_slower_a_node_is_counts_from_when_it_was_planned_with() -> None:
    rig = serving("head", "b")
    for times in (0.5, 0.4, 0.4):
        rig.relearn("b", times)
    assert rig.driver.status.members[1].devices[0].decode_bytes_s == pytest.approx(4e8)
    rig.relearn("b", 1.0)
    assert rig.driver.status.members[1].devices[0].decode_bytes_s == 1e9
    rig.relearn("nobody", 0.5)


def test_a_link_that_has_changed_is_known_to_who_brought_it() -> None:
    rig = serving("head", "b")
    link = LinkFacts("head", "b", 0.001, 1e8)
    rig.driver.handle(Joined(dataclasses.replace(rig.driver.status.members[1], links=(link,))))
    slower = LinkFacts("head", "b", 0.002, 5e7)
    rig.driver.handle(Relearned("head", link=slower))
    assert rig.driver.status.members[1].links == (slower,)
    rig.driver.handle(Relearned("head", link=LinkFacts("head", "z", 1.0)))
    assert rig.driver.status.members[1].links == (slower,)


def test_how_fast_a_node_was_under_an_older_plan_is_not_counted_from_the_newer_one() -> None:
    rig = serving("head", "b")
    before, rig.better_plan = rig.plan_now, plan_for(["head", "b"])
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    rig.driver.handle(Relearned("b", 0.4, plan=before))
    assert rig.driver.status.members[1].devices[0].decode_bytes_s == 5e8


def test_a_better_plan_that_cannot_be_loaded_gives_way_to_the_one_that_served() -> None:
    rig = serving("head", "b")
    before, rig.better_plan = rig.plan_now, plan_for(["b", "head"])
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    assert rig.plan_now != before
    rig.submit(1, request())
    rig.refuse("b")
    assert rig.plan_now == before
    rig.ready()
    rig.collect_all()
    assert rig.text(1) == "abc"
    rig.refuse("b")
    assert rig.visited() == ("head",), "that plan is not excused"


def test_a_better_plan_that_does_not_get_on_with_loading_gives_way_to_the_one_that_served() -> None:
    rig = serving("head", "b")
    before, rig.better_plan = rig.plan_now, plan_for(["b", "head"])
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    rig.passes(LOAD_STALLS_AFTER_S + 1)
    assert rig.plan_now == before


def test_when_a_node_is_lost_there_is_no_way_back_to_a_plan_with_it() -> None:
    rig = serving("head", "b")
    rig.better_plan = plan_for(["head"])
    rig.relearn("b", 0.5)
    rig.passes(2 * IDLE_S)
    rig.lose("b")
    rig.refuse("head")
    assert rig.state() is State.WAITING


def test_rates_that_come_and_go_change_plans_less_and_less_often() -> None:
    rig = serving("head", "b")
    rig.better_plan = other_plan()
    waited_s = []
    for times in (0.5, 2.0, 0.5):
        rig.relearn("b" if "b" in rig.visited() else "head", times)
        epoch, began_s = rig.epoch, rig.now_s
        rig.better_plan = plan_for(["head", "b"]) if rig.visited() == ("head",) else other_plan()
        while rig.epoch == epoch:
            rig.passes(1)
        waited_s.append(rig.now_s - began_s)
        rig.ready()
        rig.passes(0)
    assert waited_s == [IDLE_S, 2 * IDLE_S, 4 * IDLE_S]


def test_news_that_comes_all_the_time_is_thought_about_now_and_then() -> None:
    rig = serving("head", "b")
    for number in range(round(3 * IDLE_S)):
        rig.relearn("b", 0.5 + 0.001 * number)
        rig.passes(1)
    assert len(rig.asked_for_better) == 3
