"""bench/paper.py: what is foretold of the paper's homes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec

from bench.paper_facts import integer
from bench.paper_problems import EVERYONE, paper_problem
from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.costs import pass_cost
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan
from prima_core.plan.predict import predict
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional
from prima_halda import compute, ilp, solver
from prima_halda.cluster import Cluster

LARGE = ("60B", "65B", "70B")


def even(problem: Problem) -> Plan:
    return proportional(problem, solver="even")


SOLVERS: dict[str, Callable[[Problem], Plan]] = {
    "halda": solver.solve,
    "halda-ilp": ilp.solve,
    "even": even,
    "compute": compute.solve,
}


@dataclass(frozen=True, slots=True)
class Foretold:
    """`used`: layers by node, the head first. `read`: bytes from disk per token. `about`: what the solver says."""

    token_s: float
    prompt_s: float
    n_visits: int
    used: dict[str, int]
    read: dict[str, int]
    about: str

    @classmethod
    def of(cls, plan: Plan, forecast: Forecast) -> Foretold:
        layers = {name: sum(len(part) for part in plan.layers_of(name)) for name in plan.nodes}
        return cls(
            token_s=forecast.token_s,
            prompt_s=forecast.prompt_s or 0.0,
            n_visits=len(plan.visits),
            used={name: n for name, n in layers.items() if n},
            read={node.node: node.read_bytes for node in forecast.nodes if node.read_bytes},
            about=plan.certificate.about if plan.certificate else "",
        )


def foretold(name: str, problem: Problem) -> Foretold | None:
    """None: there is no plan."""
    try:
        plan = SOLVERS[name](problem)
        made = complete(plan, problem)
    except PlanError:
        return None
    return Foretold.of(plan, predict(made, problem, n_prompt=integer("prompt")))


def by_solver(model: str) -> dict[str, Foretold | None]:
    return {name: foretold(name, paper_problem(model)) for name in SOLVERS}


# ---------------------------------------------------------------- other systems, in a few lines


def mapped_s(plan: Plan, problem: Problem) -> float:
    """A token by plain mmap: a node whose weights are more than its memory reads all of them again, as a page cache
    that drops the least recently used does with a cyclic scan, and computes after that."""
    made, read_s = complete(plan, problem), 0.0
    for need in made.residency:
        if need.buffer_bytes:
            has_table = (need.node, need.device) == (problem.head, problem.end_device.id)
            table = problem.model.input_bytes if has_table else 0
            read_s += (need.weight_bytes - table) / problem.node(need.node).disk_bytes_s
    return read_s + pass_cost(msgspec.structs.replace(made, residency=()), problem).busy_s


def llama_cpp_s(model: str) -> float:
    """D3 alone, its GPU filled."""
    problem = paper_problem(model, ("D3",), rounds=1)
    return mapped_s(even(problem), problem)


def no_halda_s(model: str) -> float:
    """Layers in proportion to memory, one visit each."""
    problem = paper_problem(model, rounds=1)
    return mapped_s(even(problem), problem)


def dllama_s(model: str) -> float | None:
    """Each layer cut into as many slices as there are nodes, on their CPUs; its attention's and its feed-forward's
    results are put together over the links. None: a slice is more than a node's memory."""
    problem = paper_problem(model)
    facts = problem.model
    n_bytes = (sum(facts.layer_bytes) + facts.output_bytes) / len(problem.nodes)
    if any(n_bytes > node.memory_bytes for node in problem.nodes):
        return None
    slowest_s = max(n_bytes / node.places[-1].decode_bytes_s for node in problem.nodes)
    return slowest_s + 2 * facts.n_layers * problem.links[0].time_s(facts.activation_bytes)


# ---------------------------------------------------------------- what is shown


@dataclass(frozen=True, slots=True)
class Rounds:
    """Of the published program: the k that it chooses (0: it has no answer), its own time for that, and the least of
    its times for any k above 1."""

    chosen: int
    time_s: float
    more_rounds_s: float | None


def published_rounds(problem: Problem) -> Rounds:
    devices, n_layers = ilp.devices_of(Cluster.of(problem)), problem.model.n_layers
    answer = ilp.answered(devices, n_layers)
    several = (k for k in range(2, n_layers // 2 + 1) if n_layers % k == 0)
    others = [found.time_s for k in several if (found := ilp.answered(devices, n_layers, k)) is not None]
    chosen, time_s = (answer.n_rounds, answer.time_s) if answer else (0, 0.0)
    return Rounds(chosen, time_s, min(others, default=None))


STREAMING: dict[str, dict[str, int | bool]] = {
    "all stays in memory": {"streaming": False},
    "streaming, 1 visit": {"rounds": 1},
    "streaming and rounds": {},
}


def by_streaming(model: str) -> dict[str, Foretold | None]:
    problem = paper_problem(model)
    asked = {name: msgspec.structs.replace(problem, **changes) for name, changes in STREAMING.items()}
    return {name: foretold("halda", changed) for name, changed in asked.items()}


@dataclass(frozen=True, slots=True)
class Subset:
    names: tuple[str, ...]
    plan: Foretold

    @property
    def idle(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.plan.used)


def subsets(model: str, of: Iterable[Sequence[str]] = ()) -> list[Subset]:
    """halda's plans for these sets of nodes, or for all that there are of the six; the fastest and smallest first."""
    asked = list(of) or [names for n in range(1, len(EVERYONE) + 1) for names in combinations(EVERYONE, n)]
    found = [(tuple(names), foretold("halda", paper_problem(model, names))) for names in asked]
    made = [Subset(names, plan) for names, plan in found if plan is not None]
    return sorted(made, key=lambda one: (round(one.plan.token_s, 6), len(one.names), one.names))


def worth_from(model: str, names: Sequence[str], newcomer: str, steps: Sequence[float]) -> float | None:
    """How many times as fast as assumed the newcomer has to compute until halda gives it layers; None: not even with
    the last of these."""
    for times in steps:
        problem = _with_rates(paper_problem(model, (*names, newcomer)), newcomer, times)
        plan = foretold("halda", problem)
        if plan is not None and newcomer in plan.used:
            return times
    return None


def _with_rates(problem: Problem, name: str, times: float) -> Problem:
    node = problem.node(name)
    faster = tuple(
        msgspec.structs.replace(device, decode_bytes_s=times * device.decode_bytes_s) for device in node.devices
    )
    changed = msgspec.structs.replace(node, devices=faster)
    nodes = tuple(changed if one is node else one for one in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes)


def baselines(model: str = "70B") -> dict[str, dict[str, float]]:
    """Of each proportional split, the times that it takes in times of halda's: as our solvers have it, with one visit
    to each node, and that by mmap."""
    once, best = paper_problem(model, rounds=1), foretold("halda", paper_problem(model))
    if best is None:
        return {}
    ways: dict[str, Callable[[str], float]] = {
        "streaming and rounds": lambda name: _token_s(foretold(name, paper_problem(model))),
        "streaming, 1 visit": lambda name: _token_s(foretold(name, once)),
        "mmap, 1 visit": lambda name: mapped_s(SOLVERS[name](once), once),
    }
    return {way: {name: time_s(name) / best.token_s for name in ("even", "compute")} for way, time_s in ways.items()}


def _token_s(plan: Foretold | None) -> float:
    return plan.token_s if plan is not None else math.inf


def against_published(problems: Iterable[Problem]) -> list[float]:
    """halda's time in times of the published program's, where that has a plan."""
    pairs = ((foretold("halda", problem), foretold("halda-ilp", problem)) for problem in problems)
    return [_token_s(own) / published.token_s for own, published in pairs if published is not None]
