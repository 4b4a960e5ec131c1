"""How many layers a node can take, and on which of its devices they lie. For solvers: pure, exact in integers where all
weights stay, with room to spare where some are streamed.

A node's layers, in the order in which it computes them, are cut into one run for each of its devices, in the order of
the devices. The first device takes as many as it can, then the second, and so on, except where that would leave layers
over: devices that share the host's memory take from each other, and the same layer may be larger on one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.plan import Split, Visit
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem
from prima_core.plan.slots import most_slots
from prima_core.plan.stream import LEAST_BUFFER_BYTES, gather_bytes


def latest_stop(problem: Problem, name: str, start: int) -> int | None:
    """The largest `stop` so that [start, stop) fits the node; None: it has not even room for the ends of the model."""
    layers = range(start, problem.model.n_layers)
    backwards = _places(problem, problem.node(name), layers[::-1])[::-1]
    fit = _first_that_fits(backwards, _host_room(problem, name))
    return None if fit is None else problem.model.n_layers - fit


def earliest_start(problem: Problem, name: str, stop: int) -> int | None:
    """The smallest `start` so that [start, stop) fits the node; None as for `latest_stop`."""
    return _first_that_fits(_places(problem, problem.node(name), range(stop)), _host_room(problem, name))


def split_visits(problem: Problem, visits: Iterable[Visit]) -> tuple[Visit, ...]:
    """The visits with a `split` where a node has several devices. Raises PlanError for a node with too little room."""
    visits = tuple(visits)
    devices = {name: _devices(problem, name, visits) for name in {visit.node for visit in visits}}
    return tuple(_with_split(visit, devices[visit.node]) for visit in visits)


def most_streaming(problem: Problem, name: str) -> int:
    """So many layers the node can take for sure, whichever these are, when it may stream."""
    node, model = problem.node(name), problem.model
    streaming = node.streaming_device
    own = [device for device in node.places if not device.shares_host and device is not streaming]
    n_layers = sum(_n_kept(problem, node, device) for device in own)
    if streaming is not None:
        kept = _n_kept(problem, node, streaming)
        spare = _beside_streaming(problem, node, streaming)
        kv = model.kv_bytes_per_token_layer * problem.kv_tokens
        n_layers += max(kept, spare // kv if kv else model.n_layers) if spare >= 0 else kept
    return min(n_layers, model.n_layers)


def _beside_streaming(problem: Problem, node: NodeFacts, device: DeviceFacts) -> int:
    """What is left for KV when all weights there are streamed; less than 0 where they cannot be."""
    model, largest = problem.model, _most_in_use(problem, device)
    buffer_bytes = max(LEAST_BUFFER_BYTES, 2 * largest + min(largest, model.largest_tensor_bytes or largest))
    host = node.memory_bytes - gather_bytes(problem, (node.name,)) - buffer_bytes
    slots = most_slots(problem, device) if device.copies else 0
    if not device.shares_host:
        return device.memory_bytes - slots if host >= 0 else -1
    gathered = node.memory_bytes - host  # and the buffer
    return min(device.memory_bytes, node.memory_bytes) - gathered - slots


def _most_in_use(problem: Problem, device: DeviceFacts) -> int:
    """Bytes of any layer that a token needs: all, but of its experts those that it is routed to."""
    model, sizes = problem.model, problem.weight_bytes(device)
    experts = model.expert_bytes or (0,) * model.n_layers
    n_idle = model.n_experts - model.n_experts_used
    idle = (of_layer * n_idle // max(1, model.n_experts) for of_layer in experts)
    return max((size - unused for size, unused in zip(sizes, idle, strict=True)), default=0)


def _n_kept(problem: Problem, node: NodeFacts, device: DeviceFacts) -> int:
    """Layers of the largest size that stay on a device."""
    kv = problem.model.kv_bytes_per_token_layer * problem.kv_tokens
    fixed = problem.fixed_bytes_on(node.name, device.id)
    room = min(device.memory_bytes, node.memory_bytes) if device.shares_host else device.memory_bytes
    return max(0, room - fixed) // max(1, max(problem.weight_bytes(device), default=0) + kv)


def split_streaming(problem: Problem, visits: Iterable[Visit]) -> tuple[Visit, ...]:
    """As `split_visits`; a node with too little room keeps what fits the devices with memory of their own, and the
    device that may stream takes the rest."""
    visits = tuple(visits)
    devices = {name: _streaming_devices(problem, name, visits) for name in {visit.node for visit in visits}}
    return tuple(_with_split(visit, devices[visit.node]) for visit in visits)


def _streaming_devices(problem: Problem, name: str, visits: Sequence[Visit]) -> dict[int, str]:
    node, streaming = problem.node(name), problem.node(name).streaming_device
    try:
        return _devices(problem, name, visits)
    except PlanError:
        if streaming is None:
            raise
    if len(node.places) == 1:
        return {}
    layers, found = _layers_of(name, visits), {}
    ids = [device.id for device in node.places]
    before, behind = node.places[: ids.index(streaming.id)], node.places[ids.index(streaming.id) + 1 :]
    for devices, order in ((before, layers), (behind[::-1], layers[::-1])):
        for device in (device for device in devices if not device.shares_host):
            left = [layer for layer in order if layer not in found]
            [place] = _places(problem, msgspec.structs.replace(node, devices=(device,)), left)
            n_taken = bisect_right(place.ends, place.room_bytes) - 1
            found.update(dict.fromkeys(left[: max(0, n_taken)], device.id))
    return {layer: found.get(layer, streaming.id) for layer in layers}


def _layers_of(name: str, visits: Sequence[Visit]) -> list[int]:
    return [layer for visit in visits if visit.node == name for layer in visit.layers]


def _devices(problem: Problem, name: str, visits: Sequence[Visit]) -> dict[int, str]:
    """The device of each layer of the node."""
    node = problem.node(name)
    layers = _layers_of(name, visits)
    cuts = _cuts(_places(problem, node, layers), _host_room(problem, name))
    if cuts is None:
        have = ", ".join(f"{device.id or 'memory'} {device.memory_bytes / 1e9:.2f} GB" for device in node.places)
        raise PlanError(
            f"{len(layers)} layers do not fit node {name!r}, which has: {have}; together"
            f" {node.room_bytes / 1e9:.2f} GB",
            hint="give it fewer layers, or use a shorter context (-c)",
        )
    if len(node.places) == 1:
        return {}
    runs = zip(node.places, pairwise((0, *cuts)), strict=True)
    return {layer: device.id for device, (start, stop) in runs for layer in layers[start:stop]}


def _with_split(visit: Visit, devices: dict[int, str]) -> Visit:
    if not devices:
        return visit
    runs = [(device, list(run)) for device, run in groupby(visit.layers, lambda layer: devices[layer])]
    return Visit(visit.node, visit.start, visit.stop, tuple(Split(device, run[0], run[-1] + 1) for device, run in runs))


# ---------------------------------------------------------------- arithmetic


@dataclass(frozen=True, slots=True)
class _Place:
    """A device for some layers: `ends[i]` are the bytes that the first i of them take there."""

    ends: list[int]
    room_bytes: int
    shares_host: bool

    def bytes_of(self, start: int, stop: int) -> int:
        return self.ends[stop] - self.ends[start]

    def of_host(self, n_bytes: int) -> int:
        return n_bytes if self.shares_host else 0


def _places(problem: Problem, node: NodeFacts, layers: Sequence[int]) -> list[_Place]:
    kv = problem.model.kv_bytes_per_token_layer * problem.kv_tokens
    places = []
    for device in node.places:
        weights = problem.weight_bytes(device)
        fixed = problem.fixed_bytes_on(node.name, device.id)
        ends = [0, *accumulate(weights[layer] + kv for layer in layers)]
        places.append(_Place(ends, device.memory_bytes - fixed, device.shares_host))
    return places


def _host_room(problem: Problem, name: str) -> int:
    node = problem.node(name)
    shared = sum(problem.fixed_bytes_on(name, device.id) for device in node.places if device.shares_host)
    return node.memory_bytes - shared


def _least_host_bytes(places: Sequence[_Place], host_room: int) -> list[list[int | None]]:
    """`[p][i]`: the fewest bytes of the host's memory that all layers from i on take on the places from p on, each
    place a run; None where they do not fit."""
    n_layers = len(places[0].ends) - 1
    table: list[list[int | None]] = [[None] * n_layers + [0]]
    for place in reversed(places):
        behind = [(stop, least) for stop, least in enumerate(table[0]) if least is not None]
        table.insert(0, [_least(place, start, behind, host_room) for start in range(n_layers + 1)])
    return table


def _least(place: _Place, start: int, behind: Sequence[tuple[int, int]], host_room: int) -> int | None:
    """The same of one place: by its best run from `start` on, where `behind` says what the rest takes behind it."""
    if place.room_bytes < 0:  # not even the ends of the model
        return None
    totals = (
        place.of_host(place.bytes_of(start, stop)) + least
        for stop, least in behind
        if stop >= start and place.bytes_of(start, stop) <= place.room_bytes
    )
    least = min(totals, default=None)
    return None if least is None or least > host_room else least


def _first_that_fits(places: Sequence[_Place], host_room: int) -> int | None:
    """The smallest index from which on all layers fit."""
    table = _least_host_bytes(places, host_room)
    return next((index for index, least in enumerate(table[0]) if least is not None), None)


def _cuts(places: Sequence[_Place], host_room: int) -> list[int] | None:
    """Where the run of each place ends: as late as the places behind allow."""
    table = _least_host_bytes(places, host_room)
    if table[0][0] is None:
        return None
    cuts: list[int] = []
    start = used = 0
    for place, behind in zip(places, table[1:], strict=True):
        start, used = _latest_cut(place, behind, start, used, host_room)
        cuts.append(start)
    return cuts


def _latest_cut(place: _Place, behind: Sequence[int | None], start: int, used: int, host_room: int) -> tuple[int, int]:
    """The end of the place's run, and the host's memory that is used then."""
    for stop in range(len(behind) - 1, start - 1, -1):
        rest, total = behind[stop], used + place.of_host(place.bytes_of(start, stop))
        if rest is not None and place.bytes_of(start, stop) <= place.room_bytes and total + rest <= host_room:
            return stop, total
    raise AssertionError("the table of least bytes promised a cut")
