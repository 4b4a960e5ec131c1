"""Offers the solvers `halda`, `halda-ilp` and `compute`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import SolverPlugin

if TYPE_CHECKING:
    from prima_core.plan.plan import Plan
    from prima_core.plan.problem import Problem


@hookimpl
def prima_solvers() -> list[SolverPlugin]:
    return [
        SolverPlugin(
            "halda", 1, "the best for a goal, from measured rates, with disks read meanwhile", halda, needs_rates=True
        ),
        SolverPlugin("halda-ilp", 1, "the integer program of the PRIMA.CPP paper, for comparison", halda_ilp),
        SolverPlugin("compute", 1, "layers in proportion to the speed of the nodes, for comparison", compute),
    ]


def halda(problem: Problem) -> Plan:
    from prima_halda.solver import solve

    return solve(problem)


def halda_ilp(problem: Problem) -> Plan:
    from prima_halda.ilp import solve

    return solve(problem)


def compute(problem: Problem) -> Plan:
    from prima_halda.compute import solve

    return solve(problem)
