"""What a plan takes on its nodes: filled in where the solver left it open, checked where it did not. Exact in integers.

Weights that fit stay. Of a node whose weights do not fit the rest is streamed, where the problem allows it, with the
buffers of least time where all rates are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.costs import PassCost, demand_bytes_s, missing_rate, pass_cost, routed_share
from prima_core.plan.overlap import Reader, best_buffers
from prima_core.plan.plan import Plan, Residency
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem
from prima_core.plan.simulate import disks_of, simulate
from prima_core.plan.stream import Overload, gather_bytes, overload_of


def residency_of(plan: Plan, problem: Problem, kv_tokens: int) -> tuple[tuple[Residency, ...], int]:
    """And the plan's `gather_bytes`. Raises PlanError for a node with too little memory, which says what would do."""
    asked = {(need.node, need.device): need for need in plan.residency if need.streamed_bytes or need.buffer_bytes}
    needs = {name: _taking_over(asked, _needs(plan, problem, name, kv_tokens)) for name in plan.nodes}
    _check_asked(plan, problem, needs, asked)
    faults = {name: fault for name, own in needs.items() if (fault := _fault(problem.node(name), own, 0)) is not None}
    for name, fault in faults.items():
        if not problem.streaming or any(need.streamed_bytes for need in needs[name]):
            raise fault
    gather = plan.gather_bytes if asked else gather_bytes(problem, faults)
    needs.update(_divided(plan, problem, needs, faults, gather))
    needs = {name: [_with_slots(plan, problem, need, own, gather) for need in own] for name, own in needs.items()}
    for name, own in needs.items():
        streams = any(need.buffer_bytes for need in own)
        if (left := _fault(problem.node(name), own, gather if streams else 0)) is not None:
            raise left
    residency = tuple(need for own in needs.values() for need in own)
    return residency, gather if any(need.buffer_bytes for need in residency) else 0


def _needs(plan: Plan, problem: Problem, name: str, kv_tokens: int) -> list[Residency]:
    """What the plan takes on each device of a node that it uses, when all weights stay."""
    devices = {device.id: device for device in problem.node(name).places}
    first = next(iter(devices))
    end = problem.device_of_ends(name)
    layers: dict[str, list[int]] = {} if end is None else {end.id: []}
    for visit in plan.visits:
        if visit.node == name:
            for part in visit.parts(first):
                layers.setdefault(part.device, []).extend(part.layers)
    kv = problem.model.kv_bytes_per_token_layer * kv_tokens
    needs = []
    for device in (device for device in devices if device in layers):
        sizes = problem.weight_bytes(devices[device])
        weights = sum(sizes[layer] for layer in layers[device])
        fixed = problem.fixed_bytes_on(name, device)
        needs.append(Residency(name, device, weights + fixed, kv * len(layers[device])))
    return needs


# ---------------------------------------------------------------- what the plan says itself

Asked = Mapping[tuple[str, str], Residency]


def _taking_over(asked: Asked, needs: Sequence[Residency]) -> list[Residency]:
    """With what the plan says is streamed; of the rest it is not believed."""
    return [
        msgspec.structs.replace(need, streamed_bytes=said.streamed_bytes, buffer_bytes=said.buffer_bytes)
        if (said := asked.get((need.node, need.device)))
        else need
        for need in needs
    ]


def _check_asked(plan: Plan, problem: Problem, needs: Mapping[str, Sequence[Residency]], asked: Asked) -> None:
    for (name, device), said in asked.items():
        own = needs.get(name, ())
        need = next((need for need in own if need.device == device), None)
        if need is None:
            raise PlanError(f"the plan streams weights on {device!r} of node {name!r}, which has none in it")
        if not problem.streaming:
            raise PlanError(f"the plan streams weights on node {name!r}, where all are to stay in memory")
        if not 0 <= said.streamed_bytes <= need.weight_bytes or said.buffer_bytes < 0:
            raise PlanError(
                f"node {name!r} would stream {said.streamed_bytes} bytes of {need.weight_bytes} on {device}"
                f" through a buffer of {said.buffer_bytes}"
            )
        load = overload_of(plan, problem, own, _place(problem, need), 0)
        streamed = max(0, said.streamed_bytes - load.table_bytes)
        if streamed and load.in_whole(streamed) != streamed:
            raise PlanError(
                f"node {name!r} streams {said.streamed_bytes} bytes on {device}, where experts and the output"
                " are streamed as a whole, or not at all",
                hint=f"let it stream {load.in_whole(streamed) + load.table_bytes} bytes",
            )
        tight = load.tight_buffer(streamed)
        if said.buffer_bytes < tight:
            raise PlanError(
                f"node {name!r} streams {said.streamed_bytes} bytes through a buffer of {said.buffer_bytes}",
                hint=f"give it a buffer of {tight} bytes at least, which a layer takes; or leave streamed_bytes and"
                " buffer_bytes out, then they are chosen",
            )


# ---------------------------------------------------------------- what is chosen


def _divided(
    plan: Plan,
    problem: Problem,
    needs: Mapping[str, Sequence[Residency]],
    faults: Mapping[str, PlanError],
    gather: int,
) -> dict[str, list[Residency]]:
    """The needs of the nodes at fault, whose weights do not all fit, with what is streamed."""
    loads = {name: _overload(plan, problem, needs[name], fault, gather) for name, fault in faults.items()}
    reading = {name: load for name, load in loads.items() if load.over_bytes}
    if not _are_rates_known(plan, problem, reading):
        return _streaming(needs, loads, {name: load.guessed_buffer() for name, load in reading.items()})
    wanted = _best_buffers(plan, problem, reading)
    divided = [_streaming(needs, loads, {name: int(size * n) for name, size in wanted.items()}) for n in _TRIES]
    if all(load.n_visits == 1 for load in reading.values()):
        return divided[0]
    times = [_pass_s(plan, problem, {**needs, **own}) for own in divided]
    return next(own for own, time_s in zip(divided, times, strict=True) if time_s <= _AS_GOOD * min(times))


_TRIES = (1.0, 1.2, 1.4, 1.7, 2.0)
"""How many times the buffers of the formulas are simulated: with few layers in a visit, larger ones can be better."""
_AS_GOOD = 1.005
"""What is about as fast and reads less is better."""


def _pass_s(plan: Plan, problem: Problem, needs: Mapping[str, Sequence[Residency]]) -> float:
    whole = msgspec.structs.replace(plan, residency=tuple(need for own in needs.values() for need in own))
    return simulate(pass_cost(whole, problem), disks_of(whole, problem)).pass_s


def _are_rates_known(plan: Plan, problem: Problem, names: Iterable[str]) -> bool:
    missing = missing_rate(msgspec.structs.replace(plan, residency=()), problem)
    return not missing and all(problem.node(name).disk_bytes_s for name in names)


def _overload(plan: Plan, problem: Problem, needs: Sequence[Residency], fault: PlanError, gather: int) -> Overload:
    node = problem.node(needs[0].node)
    device = node.streaming_device
    if device is None:
        raise fault
    load = overload_of(plan, problem, needs, device, 0)
    if not load.over_bytes:
        return load  # nothing but the table goes, which is not read in every pass
    load = overload_of(plan, problem, needs, device, gather)
    if not load.is_possible:
        raise PlanError(
            f"{fault.message}; with weights read from disk as they are used it would need {_least(load, node, device)}",
            hint=fault.hint,
        )
    return load


def _least(load: Overload, node: NodeFacts, device: DeviceFacts) -> str:
    more_bytes = load.least_room_bytes - load.room_bytes
    if load.host_room_bytes is None:
        return f"{(node.memory_bytes + more_bytes) / 1e9:.2f} GB"
    least_bytes = node.memory_bytes + max(0, load.smallest_buffer - load.host_room_bytes)
    on_device = device.memory_bytes + max(0, more_bytes)
    return f"{on_device / 1e9:.2f} GB on {device.id} and {least_bytes / 1e9:.2f} GB of the host's memory"


def _best_buffers(plan: Plan, problem: Problem, loads: Mapping[str, Overload]) -> dict[str, int]:
    cost = pass_cost(msgspec.structs.replace(plan, residency=()), problem)
    readers = [_reader(load, problem.node(name), cost) for name, load in loads.items()]
    routed = {name: routed_share(problem.model, 1) if load.slots is None else 1.0 for name, load in loads.items()}
    demanded_s = [
        routed[name] * load.experts_over_bytes / demand_bytes_s(problem.node(name), problem.model)
        for name, load in loads.items()
    ]
    return dict(zip(loads, best_buffers(readers, cost.busy_s + sum(demanded_s)), strict=True))


def _reader(load: Overload, node: NodeFacts, cost: PassCost) -> Reader:
    return Reader(
        over_bytes=load.dense_over_bytes,
        n_visits=load.n_visits,
        compute_s=cost.compute_s(node.name),
        bytes_s=node.disk_bytes_s,
        least_bytes=load.fluent_buffer,
        most_bytes=load.most_buffer,
        disk=node.disk,
        spare_bytes=load.spare_bytes,
    )


def _streaming(
    needs: Mapping[str, Sequence[Residency]], loads: Mapping[str, Overload], wanted: Mapping[str, int]
) -> dict[str, list[Residency]]:
    """The needs of the overloaded nodes, with buffers as wanted as far as they can be."""
    return {
        name: [_need_streaming(need, load, wanted.get(name, 0)) for need in needs[name]] for name, load in loads.items()
    }


def _need_streaming(need: Residency, load: Overload, wanted: int) -> Residency:
    if need.device != load.device:
        return need
    size = max(min(wanted, load.most_buffer), load.fluent_buffer) if load.over_bytes else 0
    return msgspec.structs.replace(need, streamed_bytes=load.streamed_bytes(size), buffer_bytes=size)


# ---------------------------------------------------------------- memory


def _place(problem: Problem, need: Residency) -> DeviceFacts:
    return next(place for place in problem.node(need.node).places if place.id == need.device)


def _with_slots(plan: Plan, problem: Problem, need: Residency, own: Sequence[Residency], gather: int) -> Residency:
    """With what passes on a device that copies, whose weights are no larger than in the file when they do not stay; and
    with what of that the host keeps."""
    place = _place(problem, need)
    if not (need.streamed_bytes and place.copies):
        return need
    load = overload_of(plan, problem, own, place, gather)
    streamed = need.streamed_bytes - load.table_bytes
    passing = load.passing(streamed)
    return msgspec.structs.replace(
        need,
        weight_bytes=need.weight_bytes + max(0, streamed) - passing.freed_bytes,
        slot_bytes=passing.slot_bytes,
        host_bytes=load.host_bytes(need.streamed_bytes, need.buffer_bytes),
    )


def _fault(node: NodeFacts, needs: Sequence[Residency], gather: int) -> PlanError | None:
    """Why a node cannot hold this."""
    devices = {device.id: device for device in node.places}
    for need in needs:
        place = devices[need.device]
        own = need if place.shares_host else msgspec.structs.replace(need, buffer_bytes=0)  # a buffer is the host's
        where = f" on {need.device}" if need.device else ""
        if (fault := _lacks_room([own], place.memory_bytes, node.name, where)) is not None:
            return fault
    on_host = [need if devices[need.device].shares_host else _of_host(need) for need in needs]
    return _lacks_room(on_host, node.memory_bytes - gather, node.name, "")


def _of_host(need: Residency) -> Residency:
    """What a device with a memory of its own takes from the host's."""
    return Residency(need.node, need.device, need.host_bytes, 0, buffer_bytes=need.buffer_bytes)


def _lacks_room(needs: Sequence[Residency], room_bytes: int, node: str, where: str) -> PlanError | None:
    weights, kv = sum(need.pinned_bytes for need in needs), sum(need.kv_bytes for need in needs)
    buffers, slots = sum(need.buffer_bytes for need in needs), sum(need.slot_bytes for need in needs)
    total = weights + kv + buffers + slots
    if total <= room_bytes:
        return None
    parts = f"weights {weights / 1e9:.2f}, KV {kv / 1e9:.2f}" + (f", buffer {buffers / 1e9:.2f}" if buffers else "")
    parts += f", slots {slots / 1e9:.2f}" if slots else ""
    hint = f"let it stream {total - room_bytes} bytes more, or leave streamed_bytes and buffer_bytes to be chosen"
    return PlanError(
        f"node {node!r} would need {total / 1e9:.2f} GB{where} ({parts}) and may use {room_bytes / 1e9:.2f} GB",
        hint=hint if buffers or slots else _LESS,
    )


_LESS = "add a node, give it fewer layers, split them over its devices, or use a shorter context (-c) or --kv-type q8_0"
