"""Layers in proportion to memory: the reference solver."""

from __future__ import annotations

from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional


def solve(problem: Problem) -> Plan:
    """Raises PlanError when the model does not fit the nodes in their order."""
    return proportional(problem, solver="even")
