"""Fills one node after another, in the order given."""

from __future__ import annotations

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import Problem


def solve(problem: Problem) -> Plan:
    """Raises PlanError when layers are left over."""
    n_layers, start = problem.model.n_layers, 0
    visits: list[Visit] = []
    for node in problem.nodes:
        room, stop = node.memory_bytes - problem.fixed_bytes(node.name), start
        while stop < n_layers and problem.layers_bytes(start, stop + 1) <= room:
            stop += 1
        if stop > start:
            visits.append(Visit(node.name, start, stop))
        start = stop
    if start < n_layers:
        raise PlanError(f"layers {start} to {n_layers - 1} do not fit on any node", hint="add a node")
    return Plan(n_layers=n_layers, head=problem.head, visits=tuple(visits), solver="greedy")
