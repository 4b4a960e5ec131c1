from __future__ import annotations

import sys

import msgspec
import pytest

from bench.solvers import large_problem, small_problem
from prima_core.errors import ConfigError
from prima_core.plan.check import complete
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_halda import compute
from prima_halda.cluster import Cluster
from prima_halda.ilp import Kind, answered, best_answer, devices_of, program, solve

MB = 10**6


def problem_of(*nodes: NodeFacts, n_layers: int = 12) -> Problem:
    model = ModelFacts("m", (100 * MB,) * n_layers, 0, 0, 0, 64, largest_tensor_bytes=10 * MB)
    return Problem(model, nodes, "a", 1, (LinkFacts(latency_s=0.001),))


def cpu(name: str, memory_mb: int, rate: float, disk: float = 1e9) -> NodeFacts:
    return NodeFacts(name, memory_mb * MB, (DeviceFacts("cpu", memory_mb * MB, decode_bytes_s=rate),), disk)


def test_more_rounds_than_one_never_win() -> None:
    n_compared = 0
    for problem in (*(small_problem(seed) for seed in range(60)), *(large_problem(n, 24, 1.2, n) for n in range(2, 7))):
        devices = devices_of(Cluster.of(problem))
        n_layers = problem.model.n_layers
        for kinds in ([Kind.M4] * len(devices), [device.kind(n_layers, 0, False) for device in devices]):
            once = program(devices, kinds, n_layers, 1)
            for k in (k for k in range(2, n_layers // 2 + 1) if n_layers % k == 0):
                often = program(devices, kinds, n_layers, k)
                if often is not None:
                    assert once is not None, "what can be in steps of k layers can be in single ones"
                    assert once.time_s <= often.time_s + 1e-9
                    n_compared += 1
            best = best_answer(devices, kinds, n_layers)
            assert best is None or best.n_rounds == 1
    assert n_compared > 20


def test_a_fast_accelerator_is_filled_and_slow_nodes_get_one_layer_and_are_left_out() -> None:
    gpu = DeviceFacts("gpu", 500 * MB, shares_host=False, decode_bytes_s=1e11)
    fast = NodeFacts("a", 2000 * MB, (gpu, DeviceFacts("cpu", 2000 * MB, decode_bytes_s=2e10)), 1e9)
    problem = problem_of(fast, cpu("b", 2000, 1e9))
    plan = solve(problem)
    assert plan.nodes == ("a",)
    [visit] = plan.visits
    assert [(part.device, part.stop - part.start) for part in visit.split] == [("gpu", 5), ("cpu", 7)]


def test_nodes_that_must_be_overloaded_are_those_with_fast_disks() -> None:
    problem = problem_of(cpu("a", 400, 1e10, disk=5e8), cpu("b", 400, 1e10, disk=5e9))
    devices = devices_of(Cluster.of(problem))
    answer = answered(devices, 12)
    assert answer is not None
    assert answer.layers[1] > answer.layers[0]
    assert complete(solve(problem), problem).solver == "halda-ilp"


def test_where_rates_are_not_known_it_does_as_even_and_says_so() -> None:
    plan = solve(problem_of(NodeFacts("a", 2000 * MB), cpu("b", 2000, 1e10)))
    assert plan.certificate is not None
    assert plan.certificate.about.startswith("as `even`: decode_bytes_s")


def test_without_scipy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError) as raised:
        solve(problem_of(cpu("a", 2000, 1e10)))
    assert 'pip install "prima-llm[ilp]"' in raised.value.hint


def test_compute_gives_layers_by_speed_as_far_as_memory_allows() -> None:
    nodes = (cpu("a", 2000, 1e10), cpu("b", 2000, 3e10))
    assert [len(visit.layers) for visit in compute.solve(problem_of(*nodes)).visits] == [3, 9]
    small = (nodes[0], cpu("b", 450, 3e10))
    kept = msgspec.structs.replace(problem_of(*small), streaming=False)
    assert [len(visit.layers) for visit in compute.solve(kept).visits] == [8, 4]
    unknown = (NodeFacts("a", 2000 * MB), nodes[1])
    assert [len(visit.layers) for visit in compute.solve(problem_of(*unknown)).visits] == [6, 6]
