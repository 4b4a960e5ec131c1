"""The solver `compute`: layers in proportion to how fast a node's first device decodes, as far as memory allows. A
baseline: memory, disks and links are of no account to it where they do not forbid."""

from __future__ import annotations

from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional


def solve(problem: Problem) -> Plan:
    """As `even` where the rate of a node's first device is not known. Raises PlanError when the model does not fit."""
    rates = {node.name: node.places[0].decode_bytes_s for node in problem.nodes}
    return proportional(problem, rates if all(rates.values()) else None, "compute")
