"""What-ifs and who was left out: against predictions made by hand, on small homes."""

from __future__ import annotations

import msgspec
import pytest

from bench.solvers import large_problem
from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan import explain as explain_module
from prima_core.plan import leftout as leftout_module
from prima_core.plan.check import complete
from prima_core.plan.explain import FORETOLD_LAYERS, MOST_OF_A_KIND, explain
from prima_core.plan.explanation import Explanation, WhatIf
from prima_core.plan.forecast import Forecast
from prima_core.plan.leftout import MOST_TRIED
from prima_core.plan.plan import Plan, Visit, plan_from_json, plan_to_json
from prima_core.plan.predict import predict
from prima_core.plan.problem import LinkFacts, NodeFacts, Problem
from prima_core.plan.proportional import proportional
from tests.plan.home import ATTIC, CABLE, DESK, GB, LAPTOP, MB, PHONE, TWO_VISITS, WIFI, home, node, on_desk, told

ALONE = Plan(8, "desk", (on_desk(0, 8, 2),))


def found(plan: Plan, problem: Problem) -> Explanation:
    """By a solver that knows no other plan: what a change gives is what the plan gains by it."""

    def solve(asked: Problem) -> Plan:
        raise PlanError("nothing better")

    return explain(told(plan, problem), problem, solve)


def token_s(plan: Plan, problem: Problem) -> float:
    return predict(complete(plan, problem), problem).token_s


def asked(explanation: Explanation, change: str) -> dict[str, float | None]:
    return {one.node: one.time_s for one in explanation.what_ifs if one.change == change}


def changed(problem: Problem, name: str, **facts: object) -> Problem:
    nodes = tuple(msgspec.structs.replace(one, **facts) if one.name == name else one for one in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes)


HOME = home(DESK, LAPTOP, ATTIC)


# ---------------------------------------------------------------- what would help


def test_a_disk_twice_as_fast_is_asked_where_a_node_streams_and_gives_what_is_foretold_with_it() -> None:
    problem = home(DESK)
    times = asked(found(ALONE, problem), "disk")
    assert times == {"desk": pytest.approx(token_s(ALONE, changed(problem, "desk", disk_bytes_s=2e9)))}
    assert (times["desk"] or 0) < 0.7 * token_s(ALONE, problem)


def test_more_memory_is_what_the_host_may_use_and_not_an_accelerators() -> None:
    problem = home(DESK)
    gpu, cpu = DESK.devices
    more = (gpu, msgspec.structs.replace(cpu, memory_bytes=cpu.memory_bytes + GB))
    larger = changed(problem, "desk", memory_bytes=DESK.memory_bytes + GB, devices=more)
    times = asked(found(ALONE, problem), "memory")
    assert times == {"desk": pytest.approx(token_s(ALONE, larger))}
    assert larger.nodes[0].devices[0] == gpu
    assert (times["desk"] or 0) < 0.7 * token_s(ALONE, problem)


def test_more_memory_is_not_asked_of_a_node_with_room_to_spare() -> None:
    roomy = home(DESK, node("laptop", 3000, 12e9), ATTIC)
    assert set(asked(found(TWO_VISITS, roomy), "memory")) == {"desk", "attic"}


def test_a_cable_replaces_all_links_of_a_node_that_has_only_slow_ones() -> None:
    problem = home(node("desk", 3000, 15e9, gpu_mb=650), LAPTOP, ATTIC)
    times = asked(found(TWO_VISITS, problem), "cable")
    assert times == {"laptop": pytest.approx(token_s(TWO_VISITS, msgspec.structs.replace(problem, links=(CABLE,))))}
    saved_s = 4 * (WIFI.time_s(16384) - CABLE.time_s(16384))  # there and back, in two visits
    assert token_s(TWO_VISITS, problem) - (times["laptop"] or 0) == pytest.approx(saved_s)


def test_of_two_nodes_with_one_slow_link_the_other_one_than_the_head_gets_the_cable() -> None:
    plan = Plan(8, "desk", (on_desk(0, 5, 2), Visit("laptop", 5, 8)))
    assert set(asked(found(plan, home(DESK, LAPTOP)), "cable")) == {"laptop"}


def test_where_all_links_are_quick_or_not_measured_no_cable_is_asked() -> None:
    for links in ((), (CABLE,), (LinkFacts(latency_s=0.0005, bytes_s=1e8),)):
        assert not asked(found(TWO_VISITS, msgspec.structs.replace(HOME, links=links)), "cable")


def test_a_disk_that_nodes_share_is_asked_once_and_faster_for_all() -> None:
    shared = tuple(msgspec.structs.replace(one, disk="sda") for one in (DESK, node("laptop", 300, 12e9)))
    problem = home(*shared)
    plan = Plan(8, "desk", (on_desk(0, 5, 2), Visit("laptop", 5, 8)))
    assert sum(bool(need.buffer_bytes) for need in complete(plan, problem).residency) == 2
    [time_s] = asked(found(plan, problem), "disk").values()
    both = changed(changed(problem, "desk", disk_bytes_s=2e9), "laptop", disk_bytes_s=2e9)
    assert time_s == pytest.approx(token_s(plan, both))


def test_every_used_node_but_the_head_is_left_out_once_and_the_rest_is_planned_anew() -> None:
    large = node("attic", 700, 9e9)
    problem, without_attic = home(DESK, LAPTOP, large), home(DESK, LAPTOP)
    without_laptop = msgspec.structs.replace(home(DESK, large), links=(CABLE,))
    assert asked(explain(told(TWO_VISITS, problem), problem, proportional), "without") == {
        "attic": pytest.approx(token_s(proportional(without_attic), without_attic)),
        "laptop": pytest.approx(token_s(proportional(without_laptop), without_laptop)),
    }


def test_without_a_node_that_nobody_can_replace_there_is_no_plan() -> None:
    assert asked(found(TWO_VISITS, HOME), "without") == {"attic": None, "laptop": None}


def test_what_does_not_fit_without_a_node_may_be_streamed() -> None:
    roomy = msgspec.structs.replace(home(node("desk", 1200, 15e9), node("laptop", 1200, 12e9)), streaming=False)
    plan = Plan(8, "desk", (Visit("desk", 0, 4), Visit("laptop", 4, 8)))
    [(_, time_s)] = asked(explain(told(plan, roomy), roomy, proportional), "without").items()
    assert time_s is not None
    assert time_s > token_s(plan, roomy)


def test_a_solver_that_finds_something_better_is_believed_and_one_that_does_not_costs_nothing() -> None:
    base_s = token_s(TWO_VISITS, HOME)

    def bad(problem: Problem) -> Plan:
        return ALONE

    for one in explain(told(TWO_VISITS, HOME), HOME, bad).what_ifs:
        assert one.time_s is not None
        assert one.time_s <= base_s * (1 + 1e-9) or one.change == "without"
    good = asked(explain(told(ALONE, HOME), HOME, lambda problem: TWO_VISITS), "cable")
    assert (good["laptop"] or 0) < base_s


def test_the_same_plan_is_explained_alike() -> None:
    plan = told(TWO_VISITS, HOME)
    assert explain(plan, HOME, proportional) == explain(plan, HOME, proportional)


def test_an_explanation_goes_through_json_and_a_plan_is_checked_without_it() -> None:
    plan = told(TWO_VISITS, HOME)
    whole = msgspec.structs.replace(plan, explanation=explain(plan, HOME, proportional))
    assert plan_from_json(plan_to_json(whole)) == whole
    assert complete(whole, HOME).explanation is None


def test_in_a_large_cluster_few_changes_are_tried_and_it_is_told_how_many_were_not() -> None:
    problem = large_problem(32, 128, 0.7)
    n_solved, heard = 0, list[tuple[int, int]]()

    def solve(asked: Problem) -> Plan:
        nonlocal n_solved
        n_solved += 1
        return proportional(msgspec.structs.replace(asked, rounds=1))

    plan = told(solve(problem), problem)
    found = explain(plan, problem, solve, lambda done, of: heard.append((done, of)))
    assert n_solved == 2, "the plan, and one with what gives most while the layers stay where they are"
    assert heard == [(0, 1)]
    assert len(found.what_ifs) == 4 * MOST_OF_A_KIND
    assert [one.is_estimate for one in found.what_ifs] == [False, *[True] * 15]
    times = [one.time_s or 0 for one in found.what_ifs if one.is_estimate and one.change == "memory"]
    assert times == sorted(times)
    assert all(one.time_s is None for one in found.what_ifs if one.change == "without")
    assert found.n_untried > 0


def test_the_larger_the_model_the_fewer_times_anything_is_foretold_for_what_would_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foretold: list[int] = []

    def counting(plan: Plan, problem: Problem) -> Forecast:
        foretold.append(plan.n_layers)
        return predict(plan, problem)

    monkeypatch.setattr(explain_module, "predict", counting)
    monkeypatch.setattr(leftout_module, "predict", counting)
    for n_layers in (32, 128, 512):
        problem = large_problem(32, n_layers, 0.7)
        plan = told(proportional(msgspec.structs.replace(problem, rounds=1)), problem)
        foretold.clear()
        explain(plan, problem, lambda asked: ALONE)
        assert sum(foretold) <= 4 * FORETOLD_LAYERS, "of each change with two kinds of buffers"


def test_another_goal_is_what_is_compared() -> None:
    problem = msgspec.structs.replace(HOME, goal=Goal.TTFT)
    plan = told(TWO_VISITS, problem)
    assert plan.forecast is not None
    found = explain(plan, problem, proportional)
    assert found.goal is Goal.TTFT
    assert found.time_s == plan.forecast.prompt_s
    faster = changed(problem, "desk", disk_bytes_s=2e9)
    [disk] = [one for one in found.what_ifs if one.change == "disk"]
    new_s = predict(complete(proportional(faster), faster), faster).prompt_s
    old_s = predict(complete(TWO_VISITS, faster), faster).prompt_s
    assert disk == WhatIf("disk", "desk", min(new_s or 0, old_s or 0))


# ---------------------------------------------------------------- who was left out


def test_who_was_left_out_would_cost_time_and_why_is_said() -> None:
    problem = home(DESK, LAPTOP, ATTIC, PHONE)
    [out] = found(TWO_VISITS, problem).left_out
    assert out.node == "phone"
    base_s = token_s(TWO_VISITS, problem)
    assert out.time_s is not None
    assert out.time_s > base_s
    assert out.why.startswith("computing takes ")
    by_hand = [
        Plan(8, "desk", (*TWO_VISITS.visits[:4], Visit("phone", 7, 8))),
        Plan(8, "desk", (Visit("phone", 0, 1), on_desk(1, 3, 2), *TWO_VISITS.visits[1:])),
    ]
    assert out.time_s <= min(token_s(plan, problem) for plan in by_hand) * (1 + 1e-9)


def test_a_far_node_is_left_out_because_of_its_links() -> None:
    far = msgspec.structs.replace(ATTIC, name="far")
    links = (LinkFacts("far", "", 0.1), LinkFacts("", "far", 0.1), CABLE)
    problem = Problem(HOME.model, (DESK, LAPTOP, ATTIC, far), "desk", 1000, links)
    [out] = found(TWO_VISITS, problem).left_out
    assert out.why.startswith("links take ")
    assert out.time_s is not None
    assert out.time_s - token_s(TWO_VISITS, problem) == pytest.approx(0.2, rel=0.2)


def test_a_node_without_memory_for_a_layer_or_without_rates_is_left_out_for_that() -> None:
    small, unknown = node("small", 1, 9e9), node("unknown", 900, 0.0)
    outs = found(TWO_VISITS, home(DESK, LAPTOP, ATTIC, small, unknown)).left_out
    assert {out.node: (out.time_s, out.why) for out in outs} == {
        "small": (None, "no layer fits its memory"),
        "unknown": (None, "how fast it computes is not known"),
    }


def test_a_node_whose_rate_of_many_tokens_is_not_known_is_left_out_for_that() -> None:
    [cpu] = node("slow", 900, 9e9).devices
    slow = NodeFacts("slow", 900 * MB, (msgspec.structs.replace(cpu, prefill_bytes_s=0.0),), 1e9)
    problem = msgspec.structs.replace(home(DESK, LAPTOP, ATTIC, slow), width=4)
    assert [out.why for out in found(TWO_VISITS, problem).left_out] == ["how fast it computes is not known"]


def test_of_many_that_were_left_out_the_fastest_are_tried() -> None:
    others = [node(f"n{index}", 900, 1e9 + index) for index in range(9)]
    outs = found(TWO_VISITS, home(DESK, LAPTOP, ATTIC, *others)).left_out
    assert [out.node for out in outs] == [f"n{index}" for index in reversed(range(9))]
    assert [out.time_s is None for out in outs] == [False] * MOST_TRIED + [True] * (9 - MOST_TRIED)


def test_without_a_forecast_only_names_are_told() -> None:
    nodes = tuple(NodeFacts(name, 900 * MB) for name in ("desk", "laptop"))
    problem = Problem(HOME.model, nodes, "desk", 1000)
    plan = complete(Plan(8, "desk", (Visit("desk", 0, 8),)), problem)
    explanation = explain(plan, problem, proportional)
    assert [(out.node, out.time_s) for out in explanation.left_out] == [("laptop", None)]
    assert (explanation.time_s, explanation.what_ifs) == (None, ())
