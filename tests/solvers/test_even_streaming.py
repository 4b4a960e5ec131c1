"""The solver `even` where rounds are asked for, and where the model is larger than the memory of all nodes."""

from __future__ import annotations

import random

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, Split
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_even.solver import solve

MB = 10**6
MODEL = ModelFacts("m", (100 * MB,) * 32, 200 * MB, 300 * MB, 1000, 4096, largest_tensor_bytes=20 * MB)


def node(name: str, memory_mb: int, disk_bytes_s: float = 0.0) -> NodeFacts:
    return NodeFacts(name, memory_mb * MB, (DeviceFacts("cpu", memory_mb * MB, decode_bytes_s=10e9),), disk_bytes_s)


def problem_of(*memory_mb: int, disk_bytes_s: float = 0.0, rounds: int = 0, hop_s: float = 0.003) -> Problem:
    nodes = tuple(node("abcd"[index], size, disk_bytes_s) for index, size in enumerate(memory_mb))
    return Problem(MODEL, nodes, "a", 1000, (LinkFacts(latency_s=hop_s),), rounds)


def shape(plan: Plan) -> str:
    """The node and the number of layers of every visit, e.g. `a4 b4`."""
    return " ".join(f"{visit.node}{len(visit.layers)}" for visit in plan.visits)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (0, "a16 b16"),
        (1, "a16 b16"),
        (2, "a8 b8 a8 b8"),
        (3, "a5 b5 a5 b5 a6 b6"),
        (16, " ".join(["a1 b1"] * 16)),
        (1000, " ".join(["a1 b1"] * 16)),
    ],
)
def test_every_node_is_visited_as_often_as_asked_if_it_has_layers_for_it(rounds: int, expected: str) -> None:
    assert shape(solve(problem_of(9000, 8500, rounds=rounds))) == expected


def test_a_node_alone_is_visited_once_however_many_rounds_are_asked_for() -> None:
    assert shape(solve(problem_of(9000, rounds=4))) == shape(solve(problem_of(2000, rounds=4))) == "a32"


def test_rounds_that_would_overfill_a_node_become_fewer() -> None:
    """Layers 0 and 1 fit `a`, 0 and 2 do not."""
    model = ModelFacts("m", (10, 10, 30, 10), 0, 0, 0, 9)
    problem = Problem(model, (NodeFacts("a", 25), NodeFacts("b", 40)), "a", 1, rounds=2)
    assert shape(solve(problem)) == "a2 b2"


def test_a_model_larger_than_memory_is_cut_in_proportion_and_everyone_streams() -> None:
    problem = problem_of(1500, 1000, 1000)
    plan = complete(solve(problem), problem)
    assert shape(plan) == "a11 b10 c11"
    assert all(need.streamed_bytes > 0 for need in plan.residency)


def test_a_single_node_streams_too() -> None:
    [need] = complete(solve(problem_of(2500)), problem_of(2500)).residency
    assert need.streamed_bytes > 1200 * MB


def test_a_layer_of_experts_larger_than_memory_can_be_streamed() -> None:
    model = ModelFacts("m", (1000 * MB,) * 8, 0, 100 * MB, 1000, 4096, largest_tensor_bytes=5 * MB,
                       expert_bytes=(960 * MB,) * 8, n_experts=64, n_experts_used=4)  # fmt: skip
    problem = msgspec.structs.replace(problem_of(900), model=model)
    [need] = complete(solve(problem), problem).residency
    assert need.streamed_bytes >= 8000 * MB + 100 * MB - 900 * MB


def test_where_streaming_is_not_wanted_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(PlanError, match="does not fit"):
        solve(msgspec.structs.replace(problem_of(2500), streaming=False))


def test_what_is_too_small_even_to_stream_is_an_error() -> None:
    for memory in ((100,), (100, 120), (10, 3000)):
        with pytest.raises(PlanError):
            complete(solve(problem_of(*memory)), problem_of(*memory))


def test_a_node_too_small_to_stream_gets_what_it_can_keep_or_nothing() -> None:
    problem = problem_of(2000, 20, 120)
    plan = complete(solve(problem), problem)
    assert "b" not in plan.nodes
    assert [need.streamed_bytes for need in plan.residency if need.node == "c"] in ([], [0])


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_as_asked_where_weights_stream(rounds: int) -> None:
    plan = solve(problem_of(1200, 1200, disk_bytes_s=1e9, rounds=rounds))
    assert len(plan.visits) == 2 * rounds


def test_without_known_rates_one_round_is_made() -> None:
    assert len(solve(problem_of(1200, 1200)).visits) == 2


def test_more_rounds_are_made_where_they_hide_the_disk_and_not_where_hops_cost_more() -> None:
    """Each reads while the others compute."""
    chosen = {}
    for hop_s in (0.0005, 0.5):
        problem = problem_of(1000, 500, 500, 500, disk_bytes_s=1e9, hop_s=hop_s)
        plan = solve(problem)
        times = {}
        for rounds in (1, 2, 4, 8):
            asked = msgspec.structs.replace(problem, rounds=rounds)
            times[rounds] = predict(complete(solve(asked), asked), asked).token_s
        chosen[hop_s] = len(plan.visits) // 4
        assert predict(complete(plan, problem), problem).token_s <= 1.02 * min(times.values())
    assert chosen[0.0005] > 1
    assert chosen[0.5] == 1


def test_a_device_with_its_own_memory_is_filled_before_the_cpu_streams() -> None:
    devices = (DeviceFacts("gpu", 1200 * MB, shares_host=False), DeviceFacts("cpu", 10_000 * MB))
    behind = (DeviceFacts("cpu", 10_000 * MB), DeviceFacts("gpu", 1200 * MB, shares_host=False))
    for places, expected in ((devices, "gpu 0-6 cpu 6-32"), (behind, "cpu 0-21 gpu 21-32")):
        problem = Problem(MODEL, (NodeFacts("a", 1500 * MB, places),), "a", 1000)
        [visit] = complete(solve(problem), problem).visits
        assert told(visit.split) == expected


def told(split: tuple[Split, ...]) -> str:
    return " ".join(f"{part.device} {part.start}-{part.stop}" for part in split)


def test_random_clusters_get_plans_that_hold_or_an_error() -> None:
    chance, n_plans = random.Random(4), 0
    for _ in range(150):
        problem = problem_of(
            *(chance.choice((0, 60, 200, 500, 1000, 2000)) for _ in range(chance.randint(1, 4))),
            disk_bytes_s=chance.choice((0.0, 1e9)),
            rounds=chance.choice((0, 0, 1, 3)),
        )
        try:
            plan = complete(solve(problem), problem)
        except PlanError:
            continue
        n_plans += 1
        assert complete(plan, problem) == plan
        assert solve(problem) == solve(problem)
    assert 60 < n_plans < 150


@pytest.mark.parametrize("n_layers", [1, 2])
def test_few_layers_stream_or_are_refused(n_layers: int) -> None:
    model = msgspec.structs.replace(MODEL, layer_bytes=(400 * MB,) * n_layers)
    for memory in (200, 600, 900, 1300):
        problem = msgspec.structs.replace(problem_of(memory), model=model)
        try:
            [need] = complete(solve(problem), problem).residency
        except PlanError:
            continue
        assert need.pinned_bytes + need.buffer_bytes + need.kv_bytes <= memory * MB
