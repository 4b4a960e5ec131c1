"""For authors of solvers: whether a solver does what prima asks of it.

from prima_core.testing.checks import check_solver

def test_conformance() -> None:
    [plugin] = prima_solvers()
    print(check_solver(plugin))
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

import msgspec

from prima_core.errors import ConfigError, PlanError
from prima_core.interfaces import API, SolverPlugin
from prima_core.plan.check import complete
from prima_core.plan.costs import missing_rate
from prima_core.plan.plan import Plan, plan_from_json, plan_to_json
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem, problem_from_json, problem_to_json
from prima_core.plugins import Registry
from prima_core.testing.limits import within
from prima_core.testing.problems import is_ample, random_problem
from prima_core.testing.report import Figures, NotOffered, Recorder, Report, Wrong, expect

Solve = Callable[[Problem], Plan]
FRESH_WITHIN_S = 50.0
LIMIT_S = 60.0
_SLOWER = 1.02
TRIED_OUT = 1 << 12
"""Problems with at most so many ways to lay layers on devices are tried out, to know whether there is a plan."""


def check_solver(
    solver: SolverPlugin | Solve | str, *, n_problems: int = 120, seed: int = 7, limit_s: float = LIMIT_S
) -> Report:
    """Let a solver, or only its `solve`, answer random problems (`prima_core.testing.problems`) and check its plans.

    `solver` may also be the name of one that is installed. One that takes longer than `limit_s` seconds for a problem
    hangs. Raises CheckFailed with all that is wrong, PluginError for a name that is not there, ConfigError for a wrong
    argument. PlanError where there is a plan is weak, not wrong: the report counts it,
    and it fails only where every node has ample memory, or where less than half of the plans are found. Figures of the
    last check are ratios to the solver `even`, geometric means: of the bytes on the fullest node (below 1: layers are
    spread better, for nodes that are alike), of the number of visits (below 1: fewer hops), and of the foretold time,
    per token or to the first one as the goal has it, where all rates are known (below 1: faster); and how often it is
    slower, with the problem where most.
    """
    if n_problems < 1:
        raise ConfigError(f"n_problems is {n_problems}", hint="ask one at least")
    recorder = Recorder()
    name = solver if isinstance(solver, str) else getattr(solver, "name", getattr(solver, "__name__", "solver"))
    fresh = _named(solver)
    if isinstance(solver, str):
        solver = Registry.load(os.environ).solver(solver)
    if isinstance(solver, SolverPlugin):
        recorder.run("descriptor", partial(_check_descriptor, solver))
    asked = solver.solve if isinstance(solver, SolverPlugin) else solver
    if not callable(asked):
        raise ConfigError(f"{asked!r} is no solver", hint="give the SolverPlugin, its `solve`, or its name")

    def solve(problem: Problem) -> Plan:
        return within(limit_s, partial(asked, problem), _HANGS)

    cases = _ask(solve, n_problems, seed)
    if not recorder.run("errors", partial(_check_errors, cases)) and len(cases) < n_problems:
        return recorder.report(f"solver {name}").demand()
    even = _even()
    checks: dict[str, Callable[[], Figures | None]] = {
        "layers": partial(_check_layers, cases),
        "memory": partial(_check_memory, cases),
        "problem unchanged": partial(_check_unchanged, cases),
        "same answer twice": partial(_check_again, solve, cases),
        "JSON": partial(_check_json, cases),
        "same answer in a fresh process": partial(_check_fresh, fresh, cases),
        "finds plans": partial(_check_found, even, cases),
        "speed": partial(_speed, cases),
        "compared with even": partial(_compared, even, cases),
    }
    for title, check in checks.items():
        recorder.run(title, check)
    return recorder.report(f"solver {name}").demand()


_HANGS = "plans are made while a cluster waits"


def _ask(solve: Solve, n_problems: int, seed: int) -> list[_Case]:
    """All problems and their answers, or those up to the first that gets none."""
    cases: list[_Case] = []
    for index in range(n_problems):
        cases.append(_Case.of(solve, seed, index))
        if isinstance(cases[-1].answer, Wrong):
            break
    return cases


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A problem and what came of it: a plan, or an error. `before`: the problem as JSON, before it was asked."""

    seed: int
    index: int
    problem: Problem
    before: bytes
    answer: object
    took_s: float

    @classmethod
    def of(cls, solve: Solve, seed: int, index: int) -> _Case:
        problem = random_problem(seed, index)
        before, start = problem_to_json(problem), time.perf_counter()
        answer = _answer(solve, problem)
        return cls(seed, index, problem, before, answer, time.perf_counter() - start)

    @property
    def clean(self) -> Problem:
        """The problem, whatever the solver did to its copy."""
        return problem_from_json(self.before)

    @property
    def plan(self) -> Plan | None:
        return self.answer if isinstance(self.answer, Plan) else None

    def wrong(self, expected: str, came: object) -> Wrong:
        where = f"`random_problem({self.seed}, {self.index})` of prima_core.testing.problems is such a problem"
        return Wrong(expected, str(came), hint=where)


def _answer(solve: Solve, problem: Problem) -> object:
    try:
        return solve(problem)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the border to a stranger's code: what it raises is the answer
        return error


Even = Callable[[_Case], object]


# ---------------------------------------------------------------- what is wrong


def _check_descriptor(plugin: SolverPlugin) -> None:
    expect(plugin.api == API, f"api {API}", plugin.api, "write the number that the plugin was made for")
    expect(bool(plugin.name) and plugin.name == plugin.name.lower(), "a name in lower case", repr(plugin.name))
    expect(bool(plugin.summary), "a summary", repr(plugin.summary), "one line that says how it chooses")


def _check_errors(cases: Sequence[_Case]) -> Figures:
    for case in cases:
        if isinstance(case.answer, Wrong):
            raise case.wrong(case.answer.expected, case.answer.came)
        if not isinstance(case.answer, Plan | PlanError):
            raise case.wrong("a Plan, or PlanError where nothing fits", repr(case.answer))
    return {"problems": len(cases), "plans": sum(case.plan is not None for case in cases)}


def _check_layers(cases: Sequence[_Case]) -> None:
    """Every rule but those of memory: the same plan where there is more than enough."""
    for case, plan in _plans(cases):
        if (fault := _fault(_undivided(plan), _ample(case.clean))) is not None:
            raise case.wrong("every layer once, in order, on nodes and devices that are there", fault)


def _check_memory(cases: Sequence[_Case]) -> None:
    for case, plan in _plans(cases):
        if _fault(_undivided(plan), _ample(case.clean)) is None and (fault := _fault(plan, case.clean)) is not None:
            raise case.wrong("weights and KV that fit every device and node, or stream where that is wanted", fault)


def _check_unchanged(cases: Sequence[_Case]) -> None:
    for case in cases:
        if problem_to_json(case.problem) != case.before:
            raise case.wrong("the problem as it was", "a changed problem")


def _check_again(solve: Solve, cases: Sequence[_Case]) -> None:
    for case, plan in _plans(cases):
        again = _answer(solve, case.clean)
        if again != plan:
            raise case.wrong("the same plan again", "another one")


def _check_json(cases: Sequence[_Case]) -> None:
    """Plans travel as JSON; what is of another type than it says does not come back."""
    for case, plan in _plans(cases):
        try:
            back = plan_from_json(plan_to_json(plan))
        except (PlanError, TypeError) as error:
            raise case.wrong("a plan that JSON can carry", error) from None
        if back != plan:
            raise case.wrong("the same plan out of its JSON", "another one")


def _named(solver: object) -> Sequence[str]:
    """How another process finds it: the name of an installed one, or module and name; empty: it cannot."""
    if isinstance(solver, str):
        return [solver]
    solve = solver.solve if isinstance(solver, SolverPlugin) else solver
    module, name = getattr(solve, "__module__", ""), getattr(solve, "__qualname__", "<")
    return [] if module in ("", "__main__") or "<" in name else [module, name]


def _check_fresh(named: Sequence[str], cases: Sequence[_Case]) -> None:
    """Where strings hash otherwise, nothing was computed before, and nothing but memory can be touched."""
    if not named:
        raise NotOffered("only a function at the top of a module can be asked in another process")
    command = [sys.executable, "-m", "prima_core.testing.fresh", *named]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "77"}
    problems = json.dumps([case.before.decode() for case in cases])
    try:
        done = subprocess.run(
            command, input=problems, env=environ, capture_output=True, text=True, timeout=FRESH_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Wrong(f"answers of another process within {FRESH_WITHIN_S:g} s", "none") from None
    if done.returncode or not done.stdout:
        came = done.stderr.strip()[-600:] or f"a process that ended with code {done.returncode}"
        raise Wrong("answers of another process", came, hint=f"`{named[0]}` should be found there by its name")
    for case, answer in zip(cases, json.loads(done.stdout), strict=True):
        if answer != _told(case.answer):
            came = "another plan" if answer.startswith("{") else answer
            raise case.wrong("the same answer without a clock, sockets, other processes and files", came)


def _told(answer: object) -> str:
    """As `fresh.py` tells it."""
    if isinstance(answer, Plan):
        return plan_to_json(answer).decode()
    return PlanError.__name__ if isinstance(answer, PlanError) else f"{type(answer).__name__}: {answer}"


# ---------------------------------------------------------------- how good it is


def _check_found(even: Even, cases: Sequence[_Case]) -> Figures:
    possible = [case for case in cases if case.plan or isinstance(even(case), Plan) or _tried_out(case)]
    missed = [case for case in possible if isinstance(case.answer, PlanError)]
    for case in missed:
        if is_ample(case.index):
            raise case.wrong("a plan, as every device could hold the whole model", case.answer)
    hint = "nodes may be visited in any order, and more than once"
    expect(2 * len(missed) <= len(possible), f"plans for half of {len(possible)} problems", len(missed), hint)
    return {"plans missed": len(missed), "of": len(possible)}


def _tried_out(case: _Case) -> bool:
    """Whether some way to lay every layer on some device keeps the memory of all; False where there are too many."""
    problem = case.clean
    places = [(node, device) for node in problem.nodes for device in node.places]
    if len(places) ** problem.model.n_layers > TRIED_OUT:
        return False
    rooms = {node.name: node.memory_bytes for node in problem.nodes}
    left = {(node.name, device.id): device.memory_bytes for node, device in places}
    head = problem.node(problem.head)
    return _take(problem, rooms, left, head, problem.end_device, problem.fixed_bytes(head.name)) and _lay(
        problem, places, rooms, left, 0
    )


def _lay(
    problem: Problem,
    places: Sequence[tuple[NodeFacts, DeviceFacts]],
    rooms: dict[str, int],
    left: dict[tuple[str, str], int],
    layer: int,
) -> bool:
    if layer == problem.model.n_layers:
        return True
    kv = problem.model.kv_bytes_per_token_layer * problem.kv_tokens
    for node, device in places:
        size = problem.weight_bytes(device)[layer] + kv
        own_rooms, own_left = dict(rooms), dict(left)
        if _take(problem, own_rooms, own_left, node, device, size) and _lay(
            problem, places, own_rooms, own_left, layer + 1
        ):
            return True
    return False


def _take(
    problem: Problem,
    rooms: dict[str, int],
    left: dict[tuple[str, str], int],
    node: NodeFacts,
    device: DeviceFacts,
    size: int,
) -> bool:
    """Take memory of a device; False: it has not as much."""
    left[node.name, device.id] -= size
    rooms[node.name] -= size if device.shares_host else 0
    return left[node.name, device.id] >= 0 and rooms[node.name] >= 0


def _speed(cases: Sequence[_Case]) -> Figures:
    slowest = max(cases, key=lambda case: case.took_s)
    shape = f"{slowest.problem.model.n_layers} layers on {len(slowest.problem.nodes)} nodes"
    return {"slowest": f"{1e3 * slowest.took_s:.1f} ms for {shape}"}


def _compared(even: Even, cases: Sequence[_Case]) -> Figures:
    fullest, visits, times = [], [], dict[int, float]()
    for case, plan in _plans(cases):
        other, problem = even(case), case.clean
        if isinstance(other, Plan) and _fault(plan, problem) is None:
            own, others = complete(plan, problem), complete(other, problem)
            fullest.append(_fullest(own) / _fullest(others))
            visits.append(len(own.visits) / len(others.visits))
            if not missing_rate(own, problem) and not missing_rate(others, problem):
                times[case.index] = _goal_s(own, problem) / _goal_s(others, problem)
    if not fullest:
        raise NotOffered("no problem that both solve")
    figures = {
        "bytes on the fullest node": f"{geometric_mean(fullest):.2f}",
        "visits": f"{geometric_mean(visits):.2f}",
        **(_foretold(times) if times else {}),
    }
    return {**figures, "problems": len(fullest)}


def _goal_s(plan: Plan, problem: Problem) -> float:
    return goal_s(predict(plan, problem), problem.goal)


def _foretold(times: Mapping[int, float]) -> Figures:
    """By the numbers of the problems."""
    worst = max(times, key=lambda index: times[index])
    slower = sum(ratio > _SLOWER for ratio in times.values())
    most = f"{slower} of {len(times)}, most problem {worst}: {times[worst]:.2f} times" if slower else 0
    return {"foretold time": f"{geometric_mean(times.values()):.2f}", "slower than even": most}


def _fullest(plan: Plan) -> int:
    """Of a completed plan."""
    totals = {node: 1 for node in plan.nodes}
    for need in plan.residency:
        weights = need.pinned_bytes + need.host_bytes + need.slot_bytes
        totals[need.node] += weights + need.buffer_bytes + need.kv_bytes
    return max(totals.values())


# ---------------------------------------------------------------- helpers


def _plans(cases: Sequence[_Case]) -> Iterator[tuple[_Case, Plan]]:
    for case in cases:
        if case.plan is not None:
            yield case, case.plan


def _fault(plan: Plan, problem: Problem) -> PlanError | None:
    try:
        complete(plan, problem)
    except PlanError as error:
        return error
    return None


def _undivided(plan: Plan) -> Plan:
    """Without what it says of streaming."""
    return msgspec.structs.replace(plan, residency=(), gather_bytes=0)


def _ample(problem: Problem) -> Problem:
    """The problem with more memory than any plan could take."""
    lots = 1 << 60
    nodes = tuple(
        msgspec.structs.replace(
            node,
            memory_bytes=lots,
            devices=tuple(msgspec.structs.replace(device, memory_bytes=lots) for device in node.devices),
        )
        for node in problem.nodes
    )
    return msgspec.structs.replace(problem, nodes=nodes)


def _even() -> Even:
    """What the solver `even` answers, computed once."""
    solve = Registry.load({"PRIMA_PLUGINS": "even"}).solver("even").solve
    return functools.cache(lambda case: _answer(solve, case.clean))
