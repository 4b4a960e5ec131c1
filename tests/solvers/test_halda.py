"""The solver `halda`: its plans against all plans, against other solvers, and what can be worked out by hand."""

from __future__ import annotations

import msgspec
import pytest

from bench.solvers import N_WAYS, exhaustive, large_problem, small_problem, time_s
from prima_core.errors import PlanError
from prima_core.interfaces import Goal, SolverPlugin
from prima_core.plan.check import complete
from prima_core.plan.cures import with_cures
from prima_core.plan.plan import Plan
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_core.plan.proportional import proportional
from prima_core.plan.stream import overload_of
from prima_core.testing.problems import random_problem
from prima_core.testing.report import State
from prima_core.testing.solvers import check_solver
from prima_halda import compute, ilp, solver
from prima_halda.judge import Judges, Trial
from prima_halda.plugin import prima_solvers
from prima_halda.solver import _TRIED_OUT, solve
from prima_halda.starts import bound_s
from prima_halda.visits import WORTH

MB = 10**6


def node(name: str, memory_mb: int, *, rate: float = 10e9, disk: float = 1e9) -> NodeFacts:
    return NodeFacts(name, memory_mb * MB, (DeviceFacts("cpu", memory_mb * MB, decode_bytes_s=rate),), disk)


def problem_of(*nodes: NodeFacts, n_layers: int = 32, hop_s: float = 0.001, rounds: int = 0) -> Problem:
    model = ModelFacts("m", (100 * MB,) * n_layers, 20 * MB, 30 * MB, 1000, 4096, largest_tensor_bytes=20 * MB)
    return Problem(model, nodes, "a", 1000, (LinkFacts(latency_s=hop_s),), rounds)


def counts(plan: Plan) -> dict[str, int]:
    """Layers of every node."""
    return {name: sum(len(layers) for layers in plan.layers_of(name)) for name in plan.nodes}


def n_ways(problem: Problem) -> int:
    """To lay layers on places, with the output part on any node that may have it."""
    n_places = sum(len(node.places) for node in problem.nodes)
    return int(n_places**problem.model.n_layers) * len(problem.outputs)


SEARCHED = [seed for seed in range(80) if _TRIED_OUT < n_ways(small_problem(seed)) <= N_WAYS // 3]
"""Problems that the solver does not simply try out, and that a test can."""


@pytest.mark.parametrize("seed", SEARCHED[:8])
def test_a_small_problem_is_solved_within_2_percent_of_the_best_of_all_plans(seed: int) -> None:
    problem = small_problem(seed)
    best_s = exhaustive(problem)
    if best_s is None:
        with pytest.raises(PlanError):
            solve(problem)
    else:
        assert time_s(solve(problem), problem) <= 1.02 * best_s


@pytest.mark.parametrize("goal", [Goal.THROUGHPUT, Goal.TTFT])
def test_plans_for_other_goals_are_within_2_percent_of_the_best_of_all_plans(goal: Goal) -> None:
    n_checked = 0
    for seed in range(16):
        problem = small_problem(seed, goal)
        if n_ways(problem) > N_WAYS // 30:
            continue
        best_s = exhaustive(problem)
        if best_s is None:
            continue
        plan = solve(problem)
        assert time_s(plan, problem) <= 1.02 * best_s, seed
        if len(set(problem.model.layer_bytes)) == 1:
            assert plan.certificate is not None
            assert 0 < plan.certificate.bound_s <= best_s * (1 + 1e-6), seed
        n_checked += 1
    assert n_checked > 5


def test_the_bound_is_below_the_best_of_all_plans_where_layers_are_alike() -> None:
    n_checked = 0
    for seed in range(60):
        problem = small_problem(seed)
        if len(set(problem.model.layer_bytes)) > 1 or n_ways(problem) > 1000:
            continue
        best_s = exhaustive(problem)
        if best_s is not None:
            certificate = solve(problem).certificate
            assert certificate is not None
            assert 0 < certificate.bound_s <= best_s * (1 + 1e-6)
            n_checked += 1
    assert n_checked > 5


def test_the_bound_knows_that_a_head_alone_on_several_devices_needs_no_link() -> None:
    gpu = DeviceFacts("gpu", 1000 * MB, shares_host=False, decode_bytes_s=90e9)
    cpu = DeviceFacts("cpu", 1000 * MB, decode_bytes_s=10e9)
    problem = problem_of(NodeFacts("a", 1000 * MB, (gpu, cpu), 1e9), node("b", 5000), n_layers=16, hop_s=0.5)
    plan = solve(problem)
    assert plan.nodes == ("a",)
    assert plan.certificate is not None
    assert 0.9 * time_s(plan, problem) < plan.certificate.bound_s <= time_s(plan, problem)


def test_a_bound_that_the_plan_is_below_is_not_told() -> None:
    """The fast node has room for the small layer, but not for the mean of both."""
    problem = problem_of(node("a", 460, rate=5e9), node("b", 110, rate=50e9), n_layers=2)
    layers = (280 * MB, 100 * MB)
    problem = msgspec.structs.replace(
        problem, model=msgspec.structs.replace(problem.model, layer_bytes=layers), streaming=False
    )
    plan = solve(problem)
    assert plan.nodes == ("a", "b")
    assert plan.certificate is not None
    assert plan.certificate.bound_s == 0
    assert plan.certificate.about.startswith("no bound is known")


def times(problem: Problem) -> dict[str, float]:
    found = {}
    solvers = {"halda": solve, "even": proportional, "compute": compute.solve, "halda-ilp": ilp.solve}
    for name, other in solvers.items():
        try:
            found[name] = time_s(other(problem), problem)
        except PlanError:
            continue
    return found


def test_it_is_never_slower_than_the_other_solvers_and_finds_a_plan_where_they_do() -> None:
    n_compared = 0
    for index in range(90):
        problem = random_problem(11, index)
        if not problem.nodes[0].places[0].decode_bytes_s or len(problem.nodes) > 8 or problem.model.n_layers > 40:
            continue
        found = times(problem)
        assert not found or "halda" in found, index
        assert all(found["halda"] <= 1.0001 * WORTH * time_s for time_s in found.values()), (index, found)
        n_compared += len(found) > 1
    assert n_compared > 5


def test_a_large_cluster_gets_a_plan_faster_than_that_of_the_others() -> None:
    found = times(large_problem(8, 80, 0.8))
    assert found["halda"] < 0.9 * min(found["even"], found["compute"], found["halda-ilp"])


def rated(problem: Problem, prefill: float = 30.0, **more: object) -> Problem:
    """With prefill so many times as fast as decode."""
    nodes = tuple(
        msgspec.structs.replace(
            node,
            devices=tuple(
                msgspec.structs.replace(device, prefill_bytes_s=prefill * device.decode_bytes_s)
                for device in node.devices
            ),
        )
        for node in problem.nodes
    )
    return msgspec.structs.replace(problem, nodes=nodes, **more)


def test_each_goal_has_a_plan_of_its_own() -> None:
    """`b` is half as fast: for a token it is left out, many tokens are computed by both at once."""
    problem = rated(problem_of(node("a", 5000), node("b", 5000, rate=5e9)), n_prompt=1024)
    assert counts(solve(problem)) == {"a": 32}
    for goal, width in ((Goal.TTFT, 1), (Goal.THROUGHPUT, 200)):
        asked = msgspec.structs.replace(problem, goal=goal, width=width)
        shares = counts(solve(asked))
        assert 8 <= shares["b"] <= 12, goal
        assert time_s(solve(asked), asked) < 0.75 * time_s(solve(problem), asked)


def test_a_goal_for_which_a_rate_is_not_known_is_said() -> None:
    problem = msgspec.structs.replace(problem_of(node("a", 2500), node("b", 2500)), goal=Goal.TTFT)
    plan = solve(problem)
    assert plan.certificate is not None
    assert plan.certificate.about == "as `even`: prefill_bytes_s of cpu on a is not known"


def test_where_all_fits_every_node_is_visited_at_most_once() -> None:
    nodes = (node("a", 1300, disk=1e8), node("b", 1300, rate=2e10, disk=1e8), node("c", 1300, rate=4e10, disk=1e8))
    plan = solve(problem_of(*nodes))
    assert counts(plan) == {"a": 8, "b": 12, "c": 12}
    assert len(plan.visits) == len({visit.node for visit in plan.visits})


def test_visits_that_gain_next_to_nothing_are_left_out() -> None:
    """Two rounds hide all of the reading."""
    problem = problem_of(*(node(name, 900, disk=8e9) for name in "abc"))
    plan = solve(problem)
    fewest = min(
        len(other.visits)
        for rounds in (1, 2, 3, 4)
        if time_s(other := solve(msgspec.structs.replace(problem, rounds=rounds)), problem)
        <= WORTH * time_s(plan, problem)
    )
    assert len(plan.visits) <= fewest


def test_a_long_context_is_counted() -> None:
    problem = problem_of(node("a", 5000))
    short, long = (time_s(solve(asked), asked) for asked in (problem, msgspec.structs.replace(problem, n_past=100_000)))
    assert long - short == pytest.approx(32 * 1000 * 100_000 / 10e9)


def test_a_node_that_is_not_worth_its_links_is_left_out() -> None:
    assert "b" not in solve(problem_of(node("a", 5000), node("b", 5000, rate=1e9))).nodes
    with_fast = solve(problem_of(node("a", 5000), node("b", 5000, rate=1e11)))
    assert counts(with_fast) == {"a": 0, "b": 32}


def test_a_node_too_small_for_all_keeps_what_it_can_where_reading_costs_more_than_links() -> None:
    plan = complete(solve(problem := problem_of(node("a", 2000, disk=1e8), node("b", 5000, rate=2e9))), problem)
    assert not any(need.buffer_bytes for need in plan.residency)
    assert counts(plan)["a"] >= 18


def test_only_the_node_that_reads_is_visited_often() -> None:
    """`a` computes fast and has too little memory; the others hold all of theirs."""
    nodes = (node("a", 700, rate=4e10, disk=5e9), *(node(name, 450, disk=0.0) for name in "bcde"))
    problem = problem_of(*nodes, hop_s=0.0002)
    plan = complete(solve(problem), problem)
    n_visits = {name: len(plan.layers_of(name)) for name in plan.nodes}
    streaming = {need.node for need in plan.residency if need.buffer_bytes}
    assert streaming == {"a"}
    assert n_visits["a"] > 1 == min(n_visits.values())


def test_where_tensors_are_known_buffers_let_them_come_evenly() -> None:
    nodes = (node("a", 1200, disk=3e9), node("b", 700, disk=2e9), node("c", 900, disk=1e9))
    problem = problem_of(*nodes)
    tensors = ((30 * MB, 20 * MB, 20 * MB, 10 * MB, 10 * MB),) * 32
    problem = msgspec.structs.replace(
        problem, model=msgspec.structs.replace(problem.model, tensor_bytes=tensors, largest_tensor_bytes=30 * MB)
    )
    plan = complete(solve(problem), problem)
    streaming = [need for need in plan.residency if need.buffer_bytes]
    assert streaming
    for need in streaming:
        place = problem.node(need.node).places[0]
        load = overload_of(plan, problem, [msgspec.structs.replace(need, buffer_bytes=0)], place, plan.gather_bytes)
        assert load.fluent_buffer <= need.buffer_bytes <= load.room_bytes
    assert time_s(plan, problem) <= time_s(proportional(problem), problem)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_rounds_are_as_asked(rounds: int) -> None:
    problem = problem_of(*(node(name, 900, disk=2e9) for name in "abc"), rounds=rounds)
    plan = solve(problem)
    assert {len(plan.layers_of(name)) for name in plan.nodes} == {rounds}


def test_without_a_rate_the_plan_is_that_of_even_and_says_which_is_not_known() -> None:
    problem = problem_of(node("a", 2500), NodeFacts("b", 2500 * MB))
    plan = solve(problem)
    assert plan.visits == proportional(problem).visits
    assert plan.certificate is not None
    assert plan.certificate.about == "as `even`: decode_bytes_s of the memory on b is not known"


def test_a_node_whose_disk_is_not_known_keeps_what_fits() -> None:
    problem = problem_of(node("a", 1500, disk=0.0), node("b", 1500))
    plan = complete(solve(problem), problem)
    assert [need.node for need in plan.residency if need.buffer_bytes] in ([], ["b"])
    assert counts(plan)["a"] <= 14


def test_where_streaming_is_not_wanted_none_streams() -> None:
    problem = msgspec.structs.replace(problem_of(node("a", 1700), node("b", 1700, rate=1e11)), streaming=False)
    plan = complete(solve(problem), problem)
    assert not any(need.streamed_bytes for need in plan.residency)
    assert counts(plan)["b"] == 16


LOST = problem_of(node("a", 1000), node("b", 2000))


@pytest.mark.parametrize(
    ("change", "says", "cure"),
    [
        ({"model": msgspec.structs.replace(LOST.model, layer_bytes=())}, "m has no layers", "layer_bytes"),
        ({"nodes": ()}, "node 'a' is not in the cluster", "the nodes are: none"),
        ({"head": "z"}, "node 'z' is not in the cluster", "the nodes are: a, b"),
        ({"nodes": (node("a", 0), node("b", 0))}, "a 0 GB, b 0 GB", "let a use 0.2"),
        ({"nodes": (node("a", 10), node("b", 5000))}, "would need 0.05 GB", "let a use 0.02"),
        ({"kv_tokens": 10**9}, "with 1000000000 KV positions", "keep "),
        ({"nodes": (node("a", 1000, disk=1.0),)}, r"hours per token, most of it the disk of a", "times faster"),
        ({"nodes": (node("a", 5000, rate=1.0),)}, r"hours per token, most of it computing", "times faster"),
    ],
)
def test_what_is_impossible_is_named_with_what_would_help(change: dict[str, object], says: str, cure: str) -> None:
    problem = msgspec.structs.replace(LOST, **change)
    with pytest.raises(PlanError, match=says) as raised:
        solve(problem)
    hint = with_cures(problem, raised.value).hint
    assert cure in hint
    assert "e+" not in hint


def test_nodes_that_only_a_dead_link_leads_to_are_left_out_and_needed_ones_are_told() -> None:
    dead = (LinkFacts(bytes_s=1e-3),)
    model = msgspec.structs.replace(LOST.model, activation_bytes=16384)
    assert solve(msgspec.structs.replace(LOST, model=model, links=dead)).nodes == ("a",)
    with pytest.raises(PlanError, match="hours per token, most of it links"):
        solve(
            msgspec.structs.replace(LOST, model=model, links=dead, nodes=(node("a", 1000, disk=0.0), node("b", 5000)))
        )


def test_no_plan_is_below_the_bound_where_several_nodes_read_and_one_has_little_memory() -> None:
    """All of them collect no more of a prompt than that one can, which leaves more room for weights."""
    model = ModelFacts("m", (10 * MB,) * 60, 0, 0, 1000, 4096, largest_tensor_bytes=MB // 4, activation_bytes=16384)
    for large, small, disks in ((165, 70, (9e8, 1e9)), (341, 64, (4e8, 2e9)), (400, 50, (1e9, 1e9))):
        nodes = node("a", large, rate=20e9, disk=disks[0]), node("b", small, rate=20e9, disk=disks[1])
        problem = Problem(model, nodes, "a", 16, (LinkFacts(latency_s=1e-6, bytes_s=1e10),))
        plan = complete(solve(problem), problem)
        assert sum(need.buffer_bytes > 0 for need in plan.residency) == 2
        assert bound_s(Judges.of(problem)) == pytest.approx(time_s(plan, problem), rel=1e-4)


def test_a_plan_is_not_lost_over_one_with_fewer_visits_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = msgspec.structs.replace(problem_of(node("a", 2000), node("b", 2000)), streaming=False)
    impossible = Trial((0,) * 32, 0.0, 0.0, {}, 0)
    monkeypatch.setattr(solver, "with_fewer_visits", lambda *_: impossible)
    assert solve(problem).nodes == ("a", "b")


def test_where_no_disk_is_known_it_does_as_even_and_says_so() -> None:
    plan = solve(problem_of(node("a", 1000, disk=0.0), node("b", 1000, disk=0.0)))
    assert plan.certificate is not None
    assert plan.certificate.about == "as `even`: disk_bytes_s of a, b is not known"


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("plugin", prima_solvers(), ids=lambda plugin: plugin.name)
def test_it_passes_the_kit(plugin: SolverPlugin, seed: int) -> None:
    report = check_solver(plugin.name, n_problems=8, seed=seed)
    assert {check.state for check in report.checks} == {State.OK}
