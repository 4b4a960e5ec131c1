"""The rules that every plan must keep, whoever made it: a solver of ours, a stranger's, or a hand."""

from __future__ import annotations

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.problem import Problem

MAX_VISITS = 4096
MAX_IN_FLIGHT = 256
MAX_KV_TOKENS = 2**32 - 1  # as positions count on the wire


def complete(plan: Plan, problem: Problem) -> Plan:
    """The checked plan with all filled in that nodes must agree on: `kv_tokens`, `residency`, and the problem's
    `kv_type` and `context`. Raises PlanError naming the broken rule.
    """
    _check_cover(plan, problem)
    for visit in plan.visits:
        _check_visit(visit, problem)
    if not 0 <= plan.in_flight <= MAX_IN_FLIGHT:
        raise PlanError(f"in_flight is {plan.in_flight}", hint=f"allowed is 0 (automatic) to {MAX_IN_FLIGHT}")
    kv_tokens = plan.kv_tokens or problem.kv_tokens
    if not 1 <= kv_tokens <= MAX_KV_TOKENS:
        raise PlanError(f"kv_tokens is {plan.kv_tokens}", hint=f"allowed are 1 to {MAX_KV_TOKENS} positions")
    residency = tuple(_residency(plan, problem, node, kv_tokens) for node in plan.nodes)
    for need in residency:
        _check_memory(need, problem)
    model = problem.model
    return msgspec.structs.replace(
        plan, residency=residency, kv_tokens=kv_tokens, kv_type=model.kv_type, context=model.context_length
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
    at = visit.start
    for part in visit.split:
        if part.device not in node.devices:
            raise PlanError(
                f"node {node.name!r} has no device {part.device!r}", hint=f"it has: {', '.join(node.devices)}"
            )
        if part.start != at or not part.start < part.stop <= visit.stop:
            raise PlanError(f"the split of [{visit.start}, {visit.stop}) on {node.name!r} has a gap at layer {at}")
        at = part.stop
    if visit.split and at != visit.stop:
        raise PlanError(f"the split of [{visit.start}, {visit.stop}) on {node.name!r} ends at layer {at}")


def _residency(plan: Plan, problem: Problem, node: str, kv_tokens: int) -> Residency:
    ranges = plan.layers_of(node)
    weights = sum(sum(problem.model.layer_bytes[r.start : r.stop]) for r in ranges)
    kv = problem.model.kv_bytes_per_token_layer * kv_tokens * sum(len(r) for r in ranges)
    return Residency(node=node, weight_bytes=weights + problem.fixed_bytes(node), kv_bytes=kv)


def _check_memory(need: Residency, problem: Problem) -> None:
    node, total = problem.node(need.node), need.weight_bytes + need.kv_bytes
    if total > node.memory_bytes:
        raise PlanError(
            f"node {need.node!r} would need {total / 1e9:.2f} GB (weights {need.weight_bytes / 1e9:.2f},"
            f" KV {need.kv_bytes / 1e9:.2f}) and may use {node.memory_bytes / 1e9:.2f} GB",
            hint="add a node, give it fewer layers, or use a shorter context (-c) or --kv-type q8_0",
        )
