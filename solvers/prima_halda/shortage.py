"""Why a problem has no plan: what is lacking, and the smallest cure."""

from __future__ import annotations

from prima_core.errors import PlanError
from prima_core.plan.problem import Problem


def explained(problem: Problem, error: PlanError) -> PlanError:
    return error
