"""Offers the solver `even`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import SolverPlugin

if TYPE_CHECKING:
    from prima_core.plan.plan import Plan
    from prima_core.plan.problem import Problem


@hookimpl
def prima_solvers() -> list[SolverPlugin]:
    summary = "one run of layers per node, in proportion to its memory"
    return [SolverPlugin(name="even", api=1, summary=summary, solve=solve)]


def solve(problem: Problem) -> Plan:
    from prima_even.solver import solve

    return solve(problem)
