"""What a node with so many layers costs and takes, for each way to fill its devices: layers are taken as all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_core.plan.slots import most_slots
from prima_core.plan.stream import GATHER_BYTES, GATHER_SHARE, LEAST_BUFFER_BYTES
from prima_halda.cluster import Cluster, Member, Place

Floats = NDArray[np.float64]
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Filling:
    """A way to fill a node's devices, for every number of layers; `counts` by place. Bytes that are `passing` do not
    stay on the device that streams; those that are `over` are read from disk, as its host does not keep them either."""

    counts: NDArray[np.int64]
    compute_s: Floats
    passing: Floats
    over: Floats
    demanded_s: Floats
    room: Floats
    least: Floats
    possible: NDArray[np.bool_]


def fillings(cluster: Cluster, member: Member, by_largest: bool, hopeful: bool) -> list[Filling]:
    fast_first = sorted(member.places, key=lambda place: -place.bytes_s)
    own_first = sorted(fast_first, key=lambda place: place.shares_host)
    shapes: dict[tuple[tuple[int, ...], float], list[Place]] = {}
    for order in (fast_first, own_first):
        for part in (1.0, 0.8, 0.5, 0.0):  # of accelerators in the host's memory: what streams must lie elsewhere
            shapes.setdefault((tuple(place.number for place in order), part), order)
    ways: dict[bytes, Filling] = {}
    for (_, part), order in shapes.items():
        way = _way(cluster, member, order, part, by_largest, hopeful)
        ways.setdefault(way.counts.tobytes(), way)
    return list(ways.values())


def _way(
    cluster: Cluster, member: Member, order: Sequence[Place], part: float, by_largest: bool, hopeful: bool
) -> Filling:
    n_layers = cluster.n_layers
    counts = np.zeros((len(member.places), n_layers + 1), dtype=np.int64)
    left, host = np.arange(n_layers + 1), float(member.memory_bytes)
    host -= sum(place.fixed_bytes for place in member.places if place.shares_host)
    for place in order:
        size = _size(place, by_largest) + cluster.kv_bytes
        room = float(place.memory_bytes - place.fixed_bytes)
        if place.shares_host:
            room = min(room, host) * (1.0 if place is member.streaming else part)
        taken = np.minimum(left, max(0, int(room // max(1.0, size))))
        counts[member.places.index(place)] = taken
        left = left - taken
        host -= float(taken[-1]) * size if place.shares_host else 0.0
    if member.streaming is not None:
        counts[member.places.index(member.streaming)] += left
        left = np.zeros_like(left)
    return _with_costs(cluster, member, counts, left == 0, by_largest, hopeful)


def _with_costs(
    cluster: Cluster,
    member: Member,
    counts: NDArray[np.int64],
    possible: NDArray[np.bool_],
    by_largest: bool,
    hopeful: bool,
) -> Filling:
    compute_s = sum(
        (own * (place.ends_s[-1] / cluster.n_layers) for place, own in zip(member.places, counts, strict=True)),
        np.zeros(cluster.n_layers + 1),
    )
    totals = [
        own * (_size(place, by_largest) + cluster.kv_bytes) + place.fixed_bytes
        for place, own in zip(member.places, counts, strict=True)
    ]
    nothing = np.zeros(cluster.n_layers + 1)
    host = sum((total for place, total in zip(member.places, totals, strict=True) if place.shares_host), nothing)
    for place, total in zip(member.places, totals, strict=True):
        if place is not member.streaming:
            possible = possible & (total <= place.memory_bytes)
    streaming = member.streaming
    if streaming is None:
        return Filling(
            counts, compute_s, nothing, nothing, nothing, nothing, nothing, possible & (host <= member.memory_bytes)
        )
    total, own = totals[member.places.index(streaming)], counts[member.places.index(streaming)]
    fits = (host <= member.memory_bytes) & (total <= streaming.memory_bytes)
    taken = host - total if streaming.shares_host else host
    return _streaming_way(cluster, member, counts, compute_s, possible, by_largest, hopeful, taken, own, fits)


def _streaming_way(
    cluster: Cluster,
    member: Member,
    counts: NDArray[np.int64],
    compute_s: Floats,
    possible: NDArray[np.bool_],
    by_largest: bool,
    hopeful: bool,
    taken: Floats,
    own: NDArray[np.int64],
    fits: NDArray[np.bool_],
) -> Filling:
    streaming, model = member.streaming, cluster.problem.model
    assert streaming is not None
    size = _size(streaming, by_largest)
    table = streaming.table_bytes
    gather = _gather_bytes(cluster, member, hopeful)
    host, room = member.memory_bytes - taken, np.full_like(taken, float(streaming.memory_bytes))
    in_host = np.minimum(room, host) if streaming.shares_host else room
    room = in_host - own * cluster.kv_bytes
    weights, lost = own * size + streaming.fixed_bytes - table, float(gather) if streaming.shares_host else 0.0
    if streaming.device.copies:
        lost += 0.0 if hopeful else most_slots(cluster.problem, streaming.device)
    passing = np.where(fits | (weights <= room), 0.0, np.maximum(0.0, weights - room + lost))
    room = room - lost if streaming.shares_host else host - gather  # of the buffer
    over = passing if streaming.shares_host else np.maximum(0.0, passing - np.maximum(0.0, room))
    experts = own * (sum(model.expert_bytes) / cluster.n_layers) if model.expert_bytes else np.zeros_like(over)
    demanded = np.minimum(over, experts)
    routed = (sum(model.expert_bytes) / cluster.n_layers) * cluster.routed if model.expert_bytes else 0.0
    least = np.where(passing > 0, float(LEAST_BUFFER_BYTES), 0.0)
    if not hopeful:
        least = _least(cluster, member, passing > 0, over - demanded, own, size, routed)
    return Filling(
        counts=counts,
        compute_s=compute_s + (passing / streaming.device.copy_bytes_s if streaming.copy_s(1.0) else 0.0),
        passing=passing,
        over=over - demanded,
        demanded_s=demanded * (1.0 if streaming.device.copies else cluster.routed) / member.demand_bytes_s,
        room=np.maximum(room, 0.0),
        least=least,
        possible=possible & ((passing == 0) | ((least <= room) & (passing <= weights))),
    )


def _gather_bytes(cluster: Cluster, member: Member, hopeful: bool) -> int:
    """All nodes that stream gather as much: as this one can alone, or, to be hopeful, as the smallest of all could."""
    rooms = [other.memory_bytes for other in cluster.members] if hopeful else [member.memory_bytes]
    return min(GATHER_BYTES, *(room // GATHER_SHARE for room in rooms))


def _least(
    cluster: Cluster,
    member: Member,
    streams: NDArray[np.bool_],
    over: Floats,
    own: NDArray[np.int64],
    size: float,
    routed: float,
) -> Floats:
    """The smallest buffers, as `Overload` has them; of single tensors a layer's share can be made up better."""
    largest = min(cluster.problem.model.largest_tensor_bytes or size, size)
    least, spare = np.where(streams, float(LEAST_BUFFER_BYTES), 0.0), 2.5 if cluster.reads_alone(member) else 1.5
    for _ in range(_ROUNDS):
        share = np.minimum(size, (over + least) / np.maximum(own, 1) + routed)
        wanted = share + spare * largest if cluster.problem.model.tensor_bytes else 2 * share + largest
        least = np.where(streams, np.maximum(LEAST_BUFFER_BYTES, wanted), 0.0)
    return least


def _size(place: Place, by_largest: bool) -> float:
    return float(max(place.sizes)) if by_largest else sum(place.sizes) / len(place.sizes)
