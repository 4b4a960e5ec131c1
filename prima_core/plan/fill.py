"""How many layers a node can take, and on which of its devices they lie. For solvers: pure, exact in integers.

A node's layers, in the order in which it computes them, are cut into one run for each of its devices, in the order of
the devices. The first device takes as many as it can, then the second, and so on, except where that would leave layers
over: devices that share the host's memory take from each other, and the same layer may be larger on one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from prima_core.errors import PlanError
from prima_core.plan.plan import Split, Visit
from prima_core.plan.problem import NodeFacts, Problem


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


def _devices(problem: Problem, name: str, visits: Sequence[Visit]) -> dict[int, str]:
    """The device of each layer of the node."""
    node = problem.node(name)
    layers = [layer for visit in visits if visit.node == name for layer in visit.layers]
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
        fixed = problem.fixed_bytes(node.name) if device.id == problem.end_device.id else 0
        ends = [0, *accumulate(weights[layer] + kv for layer in layers)]
        places.append(_Place(ends, device.memory_bytes - fixed, device.shares_host))
    return places


def _host_room(problem: Problem, name: str) -> int:
    node = problem.node(name)
    return node.memory_bytes - (problem.fixed_bytes(name) if problem.end_device.shares_host else 0)


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
