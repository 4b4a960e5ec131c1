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
    from prima_example_greedy.solver import solve  # here: a plugin module stays light

    return solve(problem)
