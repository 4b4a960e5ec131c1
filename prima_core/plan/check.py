"""The rules that every plan must keep, whoever made it: a solver of ours, a stranger's, or a hand."""

from __future__ import annotations

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.problem import NodeFacts, Problem

MAX_VISITS = 4096
MAX_IN_FLIGHT = 256
MAX_KV_TOKENS = 2**32 - 1  # as positions count on the wire


def complete(plan: Plan, problem: Problem) -> Plan:
    """The checked plan with all filled in that nodes must agree on: `kv_tokens`, `residency`, and the problem's
    `kv_type`, `context` and `end_device`. Raises PlanError naming the broken rule.
    """
    _check_cover(plan, problem)
    for visit in plan.visits:
        _check_visit(visit, problem)
    if not 0 <= plan.in_flight <= MAX_IN_FLIGHT:
        raise PlanError(f"in_flight is {plan.in_flight}", hint=f"allowed is 0 (automatic) to {MAX_IN_FLIGHT}")
    kv_tokens = plan.kv_tokens or problem.kv_tokens
    if not 1 <= kv_tokens <= MAX_KV_TOKENS:
        raise PlanError(f"kv_tokens is {plan.kv_tokens}", hint=f"allowed are 1 to {MAX_KV_TOKENS} positions")
    residency = tuple(need for node in plan.nodes for need in _needs(plan, problem, node, kv_tokens))
    for node in plan.nodes:
        _check_memory(problem.node(node), [need for need in residency if need.node == node])
    return msgspec.structs.replace(
        plan,
        residency=residency,
        kv_tokens=kv_tokens,
        kv_type=problem.model.kv_type,
        context=problem.model.context_length,
        end_device=problem.end_device.id,
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


def _needs(plan: Plan, problem: Problem, name: str, kv_tokens: int) -> list[Residency]:
    """What the plan takes on each device of a node that it uses."""
    devices = {device.id: device for device in problem.node(name).places}
    first, end = next(iter(devices)), problem.end_device.id if name == problem.head else None
    layers: dict[str, list[int]] = {} if end is None else {end: []}
    for visit in plan.visits:
        if visit.node == name:
            for part in visit.parts(first):
                layers.setdefault(part.device, []).extend(part.layers)
    kv = problem.model.kv_bytes_per_token_layer * kv_tokens
    needs = []
    for device in (device for device in devices if device in layers):
        sizes = problem.weight_bytes(devices[device])
        weights = sum(sizes[layer] for layer in layers[device])
        fixed = problem.fixed_bytes(name) if device == end else 0
        needs.append(Residency(name, device, weights + fixed, kv * len(layers[device])))
    return needs


def _check_memory(node: NodeFacts, needs: list[Residency]) -> None:
    devices = {device.id: device for device in node.places}
    for need in needs:
        _check_room([need], devices[need.device].memory_bytes, node.name, f" on {need.device}" if need.device else "")
    _check_room([need for need in needs if devices[need.device].shares_host], node.memory_bytes, node.name, "")


def _check_room(needs: list[Residency], room_bytes: int, node: str, where: str) -> None:
    weights, kv = sum(need.weight_bytes for need in needs), sum(need.kv_bytes for need in needs)
    if weights + kv > room_bytes:
        raise PlanError(
            f"node {node!r} would need {(weights + kv) / 1e9:.2f} GB{where} (weights {weights / 1e9:.2f},"
            f" KV {kv / 1e9:.2f}) and may use {room_bytes / 1e9:.2f} GB",
            hint="add a node, give it fewer layers, split them over its devices,"
            " or use a shorter context (-c) or --kv-type q8_0",
        )
