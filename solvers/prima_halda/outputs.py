"""Which node gets the output part: the head, unless it is better elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.costs import compute_s, output_bytes
from prima_core.plan.plan import Plan
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import OUTPUT, Problem

_PROMISING = 1.02
"""With no other change the plan may be so much slower: its layers have not yet moved to where there is room now."""
_TRIED = 2
_BETTER = 0.995
"""For less nobody is asked to do the head's work."""


def with_best_output(problem: Problem, plan: Plan, solve: Callable[[Problem], Plan]) -> Plan:
    """`plan` has it on the head; `solve` makes those with the output part where their problem has it."""
    if problem.output or not problem.model.logits_bytes or len(problem.nodes) == 1:
        return plan
    best_s = _foretold(plan, problem)
    if best_s is None:
        return plan
    best, bounds = plan, [plan.certificate.bound_s] if plan.certificate else []
    for name in _promising(problem, plan, best_s):
        try:
            found = solve(problem.with_output(name))
        except PlanError:
            continue
        bounds += [found.certificate.bound_s] if found.certificate else []
        time_s = _foretold(found, problem)
        if time_s is not None and time_s < best_s * (_BETTER if best is plan else 1.0):
            best, best_s = found, time_s
    if best.certificate is None:
        return best
    certificate = msgspec.structs.replace(best.certificate, bound_s=min(bounds))
    return msgspec.structs.replace(best, certificate=certificate)


def _promising(problem: Problem, plan: Plan, best_s: float) -> list[str]:
    """Nodes that could have it: where this plan would hardly be slower for it, and where the output part alone takes
    least, the best first."""
    others = [node.name for node in problem.nodes if node.name != problem.head]
    moved = [(_foretold(msgspec.structs.replace(plan, output=name, residency=()), problem), name) for name in others]
    near = sorted((time_s, name) for time_s, name in moved if time_s is not None and time_s <= _PROMISING * best_s)
    alone = sorted((_alone_s(problem.with_output(name)), name) for name in others)
    own_s = _alone_s(problem) + _waiting_s(plan, problem)
    quick = [(time_s, name) for time_s, name in alone if time_s < own_s]
    return list(dict.fromkeys(name for _, name in (*near[:_TRIED], *quick[:_TRIED])))


def _alone_s(problem: Problem) -> float:
    """Computing of the output part, and its links."""
    output = problem.output_node
    computing_s = compute_s(problem.output_device, {OUTPUT: output_bytes(problem.model)})
    back = [problem.link(output, problem.head).time_s(problem.model.logits_bytes)] if problem.output else []
    return computing_s + sum(back)


def _waiting_s(plan: Plan, problem: Problem) -> float:
    """Of the head for its disk."""
    nodes = predict(complete(plan, problem), problem).nodes
    return sum(node.stall_s for node in nodes if node.node == problem.head)


def _foretold(plan: Plan, problem: Problem) -> float | None:
    try:
        return goal_s(predict(complete(plan, problem), problem), problem.goal)
    except PlanError:
        return None
