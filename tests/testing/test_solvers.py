"""The kit for solvers: ours pass, and each broken one is caught by the check that is about its fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from prima_core.interfaces import Goal, SolverPlugin
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem, problem_from_json, problem_to_json
from prima_core.testing.problems import is_ample, random_problem
from prima_core.testing.report import Check, CheckFailed, Report, State
from prima_core.testing.solvers import check_solver
from prima_even.plugin import prima_solvers
from tests.testing import broken_solvers as broken

N_PROBLEMS = 30


def by_name(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_our_solver_passes_and_equals_itself() -> None:
    [plugin] = prima_solvers()
    checks = by_name(check_solver(plugin))
    assert {check.state for check in checks.values()} == {State.OK}
    assert checks["compared with even"].figures["bytes on the fullest node"] == "1.00"
    assert checks["compared with even"].figures["foretold time"] == "1.00"
    assert checks["compared with even"].figures["slower than even"] == 0
    assert checks["finds plans"].figures["plans missed"] == 0
    assert 40 < int(checks["errors"].figures["plans"]) < 100, "of both kinds"
    assert "ms for" in str(checks["speed"].figures["slowest"])


@pytest.mark.parametrize(
    ("solve", "name"),
    [
        (broken.gap, "layers"),
        (broken.overlap, "layers"),
        (broken.unknown_device, "layers"),
        (broken.over_memory, "memory"),
        (broken.one_device, "memory"),
        (broken.streams_always, "memory"),
        (broken.small_buffers, "memory"),
        (broken.dice, "same answer twice"),
        (broken.mutates, "problem unchanged"),
        (broken.foreign_exception, "errors"),
        (broken.no_plan_at_all, "errors"),
        (broken.odd_types, "JSON"),
        (broken.hash_order, "same answer in a fresh process"),
        (broken.asks_the_network, "same answer in a fresh process"),
        (broken.writes_files, "same answer in a fresh process"),
        (broken.gives_up, "finds plans"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_broken_solver_is_caught_by_name(solve: Callable[[Problem], Plan], name: str) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_solver(solve, n_problems=N_PROBLEMS)
    failed = {check.name: check for check in caught.value.failures}
    assert name in failed
    assert failed[name].hint, "how to get at the problem"
    assert solve.__name__ in str(caught.value)


@pytest.mark.parametrize("solve", [broken.mutates, broken.foreign_exception, broken.hash_order, broken.writes_files])
def test_what_is_right_about_a_broken_solver_is_not_blamed(solve: Callable[[Problem], Plan]) -> None:
    with pytest.raises(CheckFailed) as caught:
        check_solver(solve, n_problems=N_PROBLEMS)
    assert not {"layers", "memory", "finds plans"} & {check.name for check in caught.value.failures}


def test_a_weak_solver_passes_and_is_told_what_it_missed() -> None:
    figures = by_name(check_solver(broken.weak, n_problems=N_PROBLEMS))["finds plans"].figures
    assert 0 < int(figures["plans missed"]) < int(figures["of"])


def test_a_solver_whose_plans_are_slow_is_told_for_which_problem() -> None:
    figures = by_name(check_solver(broken.many_rounds, n_problems=N_PROBLEMS))["compared with even"].figures
    times = re.fullmatch(r"(\d+) of (\d+), most problem (\d+): ([\d.]+) times", str(figures["slower than even"]))
    assert times is not None
    assert 0 < int(times[1]) <= int(times[2])
    assert float(times[4]) > 1.02


def test_what_cannot_be_imported_is_not_asked_in_another_process() -> None:
    [plugin] = prima_solvers()
    check = by_name(check_solver(lambda problem: plugin.solve(problem), n_problems=N_PROBLEMS))
    assert check["same answer in a fresh process"].state is State.NOT_OFFERED


def test_the_descriptor_is_checked() -> None:
    [plugin] = prima_solvers()
    with pytest.raises(CheckFailed, match="api 1") as caught:
        check_solver(SolverPlugin("Even", 0, "", plugin.solve), n_problems=1)
    assert [check.name for check in caught.value.failures] == ["descriptor"]


def test_a_report_is_plain_data() -> None:
    report = check_solver(prima_solvers()[0], n_problems=4)
    assert json.loads(report.to_json())["subject"] == "solver even"
    assert "finds plans" in str(report)


def test_problems_are_the_same_for_the_same_numbers_and_of_many_kinds() -> None:
    problems = [random_problem(7, index) for index in range(120)]
    assert problems == [random_problem(7, index) for index in range(120)]
    assert problems[1] != random_problem(8, 1)
    assert {len(problem.nodes) for problem in problems} >= {1, 2, 3, 8, 16}
    assert {len(node.devices) for problem in problems for node in problem.nodes} == {0, 1, 2, 3}
    assert {problem.streaming for problem in problems} == {True, False}
    assert {problem.rounds for problem in problems} == {0, 1, 3}
    assert {problem.goal for problem in problems} == set(Goal)
    assert {bool(node.disk_bytes_s) for problem in problems for node in problem.nodes} == {True, False}
    assert any(device.growth for problem in problems for node in problem.nodes for device in node.devices)
    assert any(node.room_bytes == 0 for problem in problems for node in problem.nodes)
    assert any(problem.fixed_bytes(problem.head) > problem.model.layer_bytes[0] for problem in problems)
    assert all(problem_from_json(problem_to_json(problem)) == problem for problem in problems)
    for index, problem in enumerate(problems):
        if is_ample(index):
            whole = problem.fixed_bytes(problem.head) + problem.layers_bytes(0, problem.model.n_layers)
            assert all(node.places[0].memory_bytes >= whole for node in problem.nodes)
