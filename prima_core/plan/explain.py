"""Why a plan is as it is: what the nodes that were left out would cost, and what other machines would give.

Each change is a changed problem. First the plan that is there is foretold with it, which takes little: so much it gives
in any case. Then the changes that promise most get a plan of their own. Work is counted, not timed: the same question
has the same answer on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.changes import Changed, changes
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
"""Changes of a kind that are told, those that give most."""
SOLVED_CELLS = 5_000
"""Layers times nodes that are planned anew, in all changes together: of 4 nodes and 80 layers all changes, of 32 and
128 one, where a plan takes two seconds."""
FORETOLD_LAYERS = 4_096
"""Layers that are foretold with a change and no new plan, in all changes together: about a second."""


def explain(
    plan: Plan, problem: Problem, solve: Solve | None = None, tell: Tell = lambda done, of: None
) -> Explanation:
    """Of a completed plan; without a forecast only who was left out. `solve`: what made the plan; None: nothing is
    changed. `tell` hears how many of how many changes have been planned for."""
    time_s = None if plan.forecast is None else _goal_s(plan.forecast, problem)
    found = Explanation(problem.goal, time_s, left_out(plan, problem))
    if plan.forecast is None or solve is None:
        return found
    kinds = changes(plan, plan.forecast, problem)
    tried = _in_turns([[(change, _kept_s(change, plan)) for change in kind] for kind in _affordable(kinds, problem)])
    n_solved = min(len(tried), SOLVED_CELLS // max(1, len(problem.nodes) * problem.model.n_layers))
    what_ifs = [WhatIf(change.change, change.node, kept_s, is_estimate=True) for change, kept_s in tried]
    for number, (change, kept_s) in enumerate(tried[:n_solved]):
        tell(number, n_solved)
        what_ifs[number] = WhatIf(change.change, change.node, _least_s(change.problem, solve, kept_s))
    n_untried = sum(map(len, kinds)) - len(what_ifs)
    return msgspec.structs.replace(found, what_ifs=tuple(what_ifs), n_untried=n_untried)


Tried = tuple[Changed, float | None]
"""A change, with what the plan that is there would take with it; None: it could not be so, or needs a new plan."""


def _affordable(kinds: Sequence[list[Changed]], problem: Problem) -> list[list[Changed]]:
    """As many of each kind as may be foretold, those that promise most."""
    each = max(1, FORETOLD_LAYERS // max(1, problem.model.n_layers * len(kinds)))
    return [[change for number, change in enumerate(kind) if number < each or _is_anew(change)] for kind in kinds]


def _is_anew(change: Changed) -> bool:
    """Whether it takes another plan in any case, so that nothing can be foretold without one."""
    return change.change == "without"


def _in_turns(kinds: list[list[Tried]]) -> list[Tried]:
    """Of every kind the few that give most, its best first; the kinds take turns, the best first again."""
    best = [sorted(kind, key=_given)[:MOST_OF_A_KIND] for kind in kinds]
    return [one for turn in zip_longest(*best) for one in sorted(filter(None, turn), key=_given)]


def _given(tried: Tried) -> float:
    return float("inf") if tried[1] is None else tried[1]


def _goal_s(forecast: Forecast, problem: Problem) -> float | None:
    with suppress(PlanError):
        return goal_s(forecast, problem.goal)
    return None


def _kept_s(change: Changed, plan: Plan) -> float | None:
    """By the visits of the plan, with its buffers or with others."""
    if _is_anew(change):
        return None
    plans = (plan, msgspec.structs.replace(plan, residency=(), gather_bytes=0))
    return min((time_s for one in plans if (time_s := _time_s(one, change.problem)) is not None), default=None)


def _least_s(problem: Problem, solve: Solve, kept_s: float | None) -> float | None:
    """By a new plan, or by the one that is there, so that a solver which does not find the best never makes a gain look
    like a loss."""
    times = [kept_s]
    with suppress(PlanError):
        times.append(_time_s(_solved(problem, solve), problem))
    return min((time_s for time_s in times if time_s is not None), default=None)


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
