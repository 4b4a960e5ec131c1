"""What would help where no plan fits: each cure is tried out here."""

from __future__ import annotations

import msgspec
import pytest

from bench.solvers import large_problem
from prima_core.errors import PlanError
from prima_core.plan import cures
from prima_core.plan.check import complete
from prima_core.plan.cures import MOST_CELLS, with_cures
from prima_core.plan.plan import Plan
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_core.plan.proportional import proportional

MB = 10**6


def node(name: str, memory_mb: int) -> NodeFacts:
    return NodeFacts(name, memory_mb * MB, (DeviceFacts("cpu", memory_mb * MB, decode_bytes_s=1e10),), 1e9)


def problem_of(*nodes: NodeFacts, kv_tokens: int = 1000) -> Problem:
    model = ModelFacts("m", (100 * MB,) * 32, 20 * MB, 30 * MB, 1000, 4096, largest_tensor_bytes=20 * MB)
    return Problem(model, nodes, "a", kv_tokens, (LinkFacts(latency_s=0.001),), streaming=False)


def solved(problem: Problem) -> Plan:
    return complete(proportional(problem), problem)


def cured(problem: Problem) -> PlanError:
    with pytest.raises(PlanError) as raised:
        solved(problem)
    return with_cures(problem, raised.value)


def memory_told(error: PlanError) -> tuple[str, float]:
    """Which node, and how many MB."""
    _, name, _, gb, *_ = error.hint.split()
    return name, 1000 * float(gb)


def test_the_least_memory_is_told_that_does_on_one_node() -> None:
    error = cured(problem_of(node("a", 1000), node("b", 2000)))
    assert error.message.startswith("m does not fit")
    assert error.hint.endswith("; or let weights that do not fit be read from disk for every token")
    name, needed_mb = memory_told(error)
    for share, helps in ((1.01, True), (0.9, False)):
        more = {name: round(needed_mb * share)}
        larger = problem_of(node("a", 1000 + more.get("a", 0)), node("b", 2000 + more.get("b", 0)))
        if helps:
            assert solved(larger)
        else:
            cured(larger)


def least_mb(rooms_mb: dict[str, int], name: str) -> int:
    """What does on this node, found step by step."""
    for more_mb in range(0, 3000, 2):
        rooms = {one: room + more_mb * (one == name) for one, room in rooms_mb.items()}
        try:
            solved(problem_of(*(node(one, room) for one, room in rooms.items())))
        except PlanError:
            continue
        return more_mb
    raise AssertionError(name)


@pytest.mark.parametrize("rooms_mb", [{"a": 1042, "b": 1900}, {"a": 1060, "b": 1995}, {"b": 700, "a": 1095}])
def test_the_node_is_named_that_needs_least(rooms_mb: dict[str, int]) -> None:
    name, told_mb = memory_told(cured(problem_of(*(node(one, room) for one, room in rooms_mb.items()))))
    least = {one: least_mb(rooms_mb, one) for one in rooms_mb}
    assert least[name] <= 1.02 * min(least.values())
    assert least[name] - 2 <= told_mb <= 1.02 * least[name] + 2


def test_a_context_that_is_too_long_is_told_with_one_that_is_not() -> None:
    problem = problem_of(node("a", 3400), kv_tokens=8000)
    error = cured(problem)
    assert "--kv-type q8_0" in error.hint
    kept = int(error.hint.split("keep ")[1].split()[0])
    assert 4000 < kept < 8000
    assert solved(msgspec.structs.replace(problem, kv_tokens=kept))


def test_memory_that_nobody_has_is_no_cure() -> None:
    assert "memory" not in cured(problem_of(node("a", 3400), kv_tokens=10**9)).hint


def test_where_room_does_not_lack_the_error_stays_as_it_is() -> None:
    error = PlanError("the solver is broken", hint="mend it")
    assert with_cures(problem_of(node("a", 5000)), error) is error


def test_in_a_large_cluster_cures_take_no_more_work_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    n_cells = 0

    def counting(problem: Problem) -> Plan:
        nonlocal n_cells
        n_cells += problem.model.n_layers * len(problem.nodes)
        return proportional(problem)

    monkeypatch.setattr(cures, "proportional", counting)
    for n_layers in (128, 800):
        n_cells = 0
        problem = msgspec.structs.replace(large_problem(32, n_layers, 0.7), streaming=False)
        error = with_cures(problem, PlanError("it does not fit"))
        assert "let weights that do not fit be read from disk" in error.hint
        assert n_cells <= MOST_CELLS + 32 * n_layers
    assert "GB more of memory" in error.hint
