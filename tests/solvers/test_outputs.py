"""The solver `halda` on where the output part is."""

from __future__ import annotations

import msgspec
import pytest

from bench.solvers import N_WAYS, exhaustive, small_problem, time_s
from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.check import complete
from prima_core.plan.cures import with_cures
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_halda.judge import Judges
from prima_halda.solver import solve
from prima_halda.starts import bound_s

MB = 10**6


def node(name: str, memory_mb: int, disk_bytes_s: float = 1e9) -> NodeFacts:
    device = DeviceFacts("cpu", memory_mb * MB, decode_bytes_s=10e9, prefill_bytes_s=200e9)
    return NodeFacts(name, memory_mb * MB, (device,), disk_bytes_s)


def problem_of(*nodes: NodeFacts, logits_bytes: int = 600_000) -> Problem:
    model = ModelFacts(
        "m", (100 * MB,) * 8, 300 * MB, 300 * MB, 1000, 4096, input_row_bytes=4096, activation_bytes=16384
    )
    model = msgspec.structs.replace(model, logits_bytes=logits_bytes, largest_tensor_bytes=20 * MB)
    return Problem(model, nodes, "a", 1000, (LinkFacts(latency_s=0.0005, bytes_s=100e6),))


def test_a_head_that_would_have_to_read_the_output_matrix_leaves_it_to_a_node_with_room() -> None:
    problem = problem_of(node("a", 150, 200e6), node("b", 2000), node("c", 500))
    plan = solve(problem)
    assert plan.output == "b"
    assert predict(complete(plan, problem), problem).nodes[0].read_bytes == 0
    on_head = msgspec.structs.replace(problem, model=msgspec.structs.replace(problem.model, logits_bytes=0))
    assert time_s(plan, problem) < time_s(solve(on_head), on_head) / 2


def test_a_head_with_room_keeps_the_output_part() -> None:
    assert solve(problem_of(node("a", 2000), node("b", 2000))).output == ""


def test_logits_that_take_long_to_the_head_keep_the_output_part_there() -> None:
    small = node("a", 250, 200e6), node("b", 2000)
    assert solve(problem_of(*small)).output == "b"
    assert solve(problem_of(*small, logits_bytes=100 * MB)).output == ""


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_no_plan_with_the_output_part_on_any_node_is_faster_by_2_percent(seed: int, goal: Goal) -> None:
    problem = small_problem(seed, goal)
    if sum(len(node.places) for node in problem.nodes) ** problem.model.n_layers > N_WAYS // 60:
        problem = msgspec.structs.replace(problem, nodes=problem.nodes[:2], links=problem.links[:1])
    head = node("a", 250 + 130 * seed)
    others = tuple(
        msgspec.structs.replace(
            one,
            memory_bytes=one.memory_bytes + 700 * MB,
            devices=tuple(
                msgspec.structs.replace(device, memory_bytes=device.memory_bytes + 700 * MB) for device in one.devices
            ),
        )
        for one in problem.nodes[1:]
    )
    model = msgspec.structs.replace(problem.model, logits_bytes=600_000, output_bytes=400 * MB, input_row_bytes=4096)
    problem = msgspec.structs.replace(problem, model=model, nodes=(head, *others))
    times = [exhaustive(problem.with_output(one.name)) for one in problem.nodes]
    best_s = min(time for time in times if time is not None)
    plan = solve(problem)
    assert time_s(plan, problem) <= 1.02 * best_s


def test_where_the_output_part_fits_only_elsewhere_it_goes_there() -> None:
    problem = msgspec.structs.replace(problem_of(node("a", 450), node("b", 1050)), streaming=False)
    assert solve(problem).output == "b"
    with pytest.raises(PlanError, match=r"input and output part 0\.6 GB on a"):
        solve(msgspec.structs.replace(problem, model=msgspec.structs.replace(problem.model, logits_bytes=0)))


def test_where_it_fits_nowhere_the_error_says_that_others_were_tried() -> None:
    problem = msgspec.structs.replace(problem_of(node("a", 450), node("b", 500)), streaming=False)
    with pytest.raises(PlanError, match="with the output part on another node it does not fit either") as raised:
        solve(problem)
    cured = with_cures(problem, raised.value).hint
    _, name, _, gb, *_ = cured.split()
    more = {name: int(1010 * float(gb))}
    larger = problem_of(node("a", 450 + more.get("a", 0)), node("b", 500 + more.get("b", 0)))
    assert solve(msgspec.structs.replace(larger, streaming=False))


@pytest.mark.parametrize("goal", Goal)
def test_the_bound_holds_wherever_the_output_part_is(goal: Goal) -> None:
    n_elsewhere = 0
    for seed in range(40):
        problem = small_problem(seed, goal)
        n_places = sum(len(node.places) for node in problem.nodes)
        if len(set(problem.model.layer_bytes)) > 1 or n_places**problem.model.n_layers > 300:
            continue
        judges = Judges.of(problem)
        for name in problem.outputs:
            best_s = exhaustive(problem.with_output(name))
            if best_s is not None:
                assert bound_s(judges) <= best_s * (1 + 1e-6), (seed, name)
                n_elsewhere += name != problem.head
    assert n_elsewhere > 5
