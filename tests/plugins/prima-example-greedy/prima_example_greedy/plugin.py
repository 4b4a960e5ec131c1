"""Offers the solver `greedy`: fills one node after another, so that as few machines as possible take part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import SolverPlugin

if TYPE_CHECKING:
    from prima_core.plan.plan import Plan
    from prima_core.plan.problem import Problem


@hookimpl
def prima_solvers() -> list[SolverPlugin]:
    return [SolverPlugin(name="greedy", api=1, summary="fills one node after another", solve=solve)]


def solve(problem: Problem) -> Plan:
    from prima_core.errors import PlanError
    from prima_core.plan.fill import latest_stop, split_visits
    from prima_core.plan.plan import Plan, Visit

    n_layers, start = problem.model.n_layers, 0
    visits: list[Visit] = []
    for node in problem.nodes:
        stop = latest_stop(problem, node.name, start)  # on all of its devices together
        if stop is None:
            raise PlanError(f"node {node.name} has no room for the input and output part", hint="use another head")
        if stop > start:
            visits.append(Visit(node.name, start, stop))
        start = stop
    if start < n_layers:
        raise PlanError(f"layers {start} to {n_layers - 1} do not fit on any node", hint="add a node")
    return Plan(n_layers, problem.head, split_visits(problem, visits), solver="greedy", output=problem.output)
