"""Why a plan is as it is: what the nodes that were left out would cost, and what other machines would give.

Each change is a changed problem, which is solved and foretold as the first was. The plan that is there is tried with
the change too, so that a solver which does not find the best never makes a gain look like a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.changes import changes
from prima_core.plan.check import complete
from prima_core.plan.explanation import Explanation, WhatIf
from prima_core.plan.forecast import Forecast
from prima_core.plan.leftout import left_out
from prima_core.plan.plan import Plan
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import Problem

Solve = Callable[[Problem], Plan]
Tell = Callable[[int, int], None]

MOST_OF_A_KIND = 4
"""Changes of a kind that are tried, those that promise most: in a large cluster each takes a second to plan."""


def explain(
    plan: Plan, problem: Problem, solve: Solve | None = None, tell: Tell = lambda done, of: None
) -> Explanation:
    """Of a completed plan; without a forecast only who was left out. `solve`: what made the plan; None: nothing is
    changed. `tell` hears how many of how many changes have been tried."""
    time_s = None if plan.forecast is None else _goal_s(plan.forecast, problem)
    found = Explanation(problem.goal, time_s, left_out(plan, problem))
    if plan.forecast is None or solve is None:
        return found
    kinds = changes(plan, plan.forecast, problem)
    chosen = [changed for kind in kinds for changed in kind[:MOST_OF_A_KIND]]
    what_ifs: list[WhatIf] = []
    for changed in chosen:
        tell(len(what_ifs), len(chosen))
        what_ifs.append(WhatIf(changed.change, changed.node, _least_s(changed.problem, plan, solve)))
    n_untried = sum(map(len, kinds)) - len(chosen)
    return msgspec.structs.replace(found, what_ifs=tuple(what_ifs), n_untried=n_untried)


def _goal_s(forecast: Forecast, problem: Problem) -> float | None:
    with suppress(PlanError):
        return goal_s(forecast, problem.goal)
    return None


def _least_s(problem: Problem, plan: Plan, solve: Solve) -> float | None:
    """By a new plan, or by the visits of the old one, with its buffers or with others."""
    plans = [plan, msgspec.structs.replace(plan, residency=(), gather_bytes=0)]
    with suppress(PlanError):
        plans.append(_solved(problem, solve))
    times = [time_s for one in plans if (time_s := _time_s(one, problem)) is not None]
    return min(times, default=None)


def _solved(problem: Problem, solve: Solve) -> Plan:
    """What does not fit any more may be streamed, as when nodes are lost."""
    try:
        return solve(problem)
    except PlanError:
        if problem.streaming:
            raise
        return solve(msgspec.structs.replace(problem, streaming=True))


def _time_s(plan: Plan, problem: Problem) -> float | None:
    streaming = msgspec.structs.replace(problem, streaming=True)
    with suppress(PlanError):
        return goal_s(predict(complete(plan, streaming), streaming), problem.goal)
    return None
