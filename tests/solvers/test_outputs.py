"""The solver `halda` on where the output part is."""

from __future__ import annotations

import msgspec
import pytest

from bench.solvers import N_WAYS, exhaustive, small_problem, time_s
from prima_core.interfaces import Goal
from prima_core.plan.check import complete
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_halda.solver import solve

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
