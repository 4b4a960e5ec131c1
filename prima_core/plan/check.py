"""The rules that every plan must keep, whoever made it: a solver of ours, a stranger's, or a hand."""

from __future__ import annotations

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import Problem
from prima_core.plan.residency import residency_of

MAX_VISITS = 4096
MAX_IN_FLIGHT = 256
MAX_KV_TOKENS = 2**32 - 1  # as positions count on the wire


def complete(plan: Plan, problem: Problem) -> Plan:
    """The checked plan with all filled in that nodes must agree on: `kv_tokens`, `residency`, `gather_bytes`, and the
    problem's `kv_type`, `context` and devices of the ends. Raises PlanError naming the broken rule.

    A node whose weights do not fit streams the rest, where the problem allows it: see `residency.py`.
    """
    _check_cover(plan, problem)
    problem = problem.with_output(plan.output)
    for visit in plan.visits:
        _check_visit(visit, problem)
    if not 0 <= plan.in_flight <= MAX_IN_FLIGHT:
        raise PlanError(f"in_flight is {plan.in_flight}", hint=f"allowed is 0 (automatic) to {MAX_IN_FLIGHT}")
    kv_tokens = plan.kv_tokens or problem.kv_tokens
    if not 1 <= kv_tokens <= MAX_KV_TOKENS:
        raise PlanError(f"kv_tokens is {plan.kv_tokens}", hint=f"allowed are 1 to {MAX_KV_TOKENS} positions")
    residency, gather_bytes = residency_of(plan, problem, kv_tokens)
    return msgspec.structs.replace(
        plan,
        residency=residency,
        kv_tokens=kv_tokens,
        kv_type=problem.model.kv_type,
        context=problem.model.context_length,
        end_device=problem.end_device.id,
        output=problem.output,
        output_device=problem.output_device.id if problem.output else "",
        gather_bytes=gather_bytes,
        forecast=None,
        explanation=None,
    )


def _check_cover(plan: Plan, problem: Problem) -> None:
    n_layers = problem.model.n_layers
    if plan.n_layers != n_layers:
        raise PlanError(f"the plan is for {plan.n_layers} layers, the model has {n_layers}")
    if plan.head != problem.head:
        raise PlanError(f"the plan's head is {plan.head!r}, the cluster's is {problem.head!r}")
    if not 1 <= len(plan.visits) <= MAX_VISITS:
        raise PlanError(f"the plan has {len(plan.visits)} visits", hint=f"allowed are 1 to {MAX_VISITS}")
    at = 0
    for index, visit in enumerate(plan.visits):
        if visit.start != at or not visit.start < visit.stop <= n_layers:
            raise PlanError(
                f"visit {index} covers layers [{visit.start}, {visit.stop}), expected a range that starts at {at}",
                hint=f"visits cover [0, {n_layers}) in order, without gaps",
            )
        at = visit.stop
    if at != n_layers:
        raise PlanError(f"the visits end at layer {at}, the model has {n_layers}")


def _check_visit(visit: Visit, problem: Problem) -> None:
    node = problem.node(visit.node)
    known = {device.id for device in node.devices}
    at = visit.start
    for part in visit.split:
        if part.device not in known:
            raise PlanError(
                f"node {node.name!r} has no device {part.device!r}",
                hint=f"it has: {', '.join(device.id for device in node.devices)}",
            )
        if part.start != at or not part.start < part.stop <= visit.stop:
            raise PlanError(
                f"the split of [{visit.start}, {visit.stop}) on {node.name!r} gives {part.device} the layers"
                f" [{part.start}, {part.stop}), expected a range that starts at {at}",
                hint=f"parts cover [{visit.start}, {visit.stop}) in order, without gaps",
            )
        at = part.stop
    if visit.split and at != visit.stop:
        raise PlanError(
            f"the split of [{visit.start}, {visit.stop}) on {node.name!r} ends at layer {at}",
            hint=f"parts cover [{visit.start}, {visit.stop}) in order, without gaps",
        )
