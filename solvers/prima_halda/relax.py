"""The relaxation: how many layers each node takes, on which of its devices, in how many visits. Exact by dynamic
programming, of a simpler question: layers are all alike, visits are evenly spaced, and every visit costs the node's
usual link, whoever was before.

`cost(l; T)` is the least that a node with l layers adds to a pass of T seconds: its computing, what of its reading
nothing hides, and its links. Without T it could read as much as it likes ahead; in T seconds its disk reads no more
than T times its rate. It falls as T grows, so the least T that is as long as the sum of all costs is found by halving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prima_core.plan.slots import most_slots
from prima_core.plan.stream import GATHER_BYTES, GATHER_SHARE, LEAST_BUFFER_BYTES
from prima_halda.cluster import Cluster, Member, Place

Floats = NDArray[np.float64]
VISITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_HALVINGS = 24
_CAPS = 12
"""Times of the slowest node that are tried for a prompt."""
_ENOUGH = 1e-5
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Share:
    """What a node gets: layers by place, spread over so many visits. `streams`: not all of it stays."""

    member: int
    counts: tuple[int, ...]
    n_visits: int
    streams: bool

    @property
    def n_layers(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Relaxed:
    """`time_s` is as long as the sum of its costs; nothing below `bound_s` is, which is hardly smaller."""

    time_s: float
    bound_s: float
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked: `visits` that nodes may have, and `disk_share`: of its disk's rate that a node gets.

    `streams`: whether weights may be read at all. `without`: nodes that get nothing. `n_steps` follow each other in a
    pass, so no node may take more than its part of the time. `n_chunks` of a prompt (0: it is not about one): then a
    node reads while it computes a chunk, for all but the first this part of its weights, and takes at most `slowest_s`.
    """

    visits: tuple[int, ...] = VISITS
    disk_share: tuple[float, ...] = ()
    streams: bool = True
    without: frozenset[int] = frozenset()
    n_steps: int = 1
    n_chunks: int = 0
    reading: float = 1.0
    slowest_s: float = np.inf


@dataclass(frozen=True, slots=True)
class _Tables:
    """Of every node (first axis), way to fill its devices (second) and number of layers (last)."""

    counts: list[list[NDArray[np.int64]]]
    compute_s: Floats
    over: Floats
    demanded_s: Floats
    room: Floats
    least: Floats
    possible: NDArray[np.bool_]
    beside: NDArray[np.bool_]
    rates: Floats
    hops: Floats
    free_hops: Floats
    ends_s: Floats


class Relaxation:
    """Of one cluster, asked with several options. `by_largest`: layers are taken as large as the largest. `hopeful`:
    links are the quickest, buffers may be as small as can be; then no plan is faster than `bound_s`, but for one on the
    head alone. `rest_s`: the output part, and the way back to the head (that to it elsewhere is not)."""

    def __init__(self, cluster: Cluster, *, by_largest: bool = False, hopeful: bool = False) -> None:
        self.cluster = cluster
        self.hopeful = hopeful
        self._tables = _tables(cluster, by_largest, hopeful)
        self.rest_s = cluster.output_s + _out_s(cluster, hopeful)

    def solve(self, options: Options) -> Relaxed | None:
        """None: it cannot be. The head's own layers cost no links: activations begin and end there."""
        least_s = self.sum_s(options, np.inf)  # with all the time there is, what can be at all
        if not np.isfinite(least_s):
            return None
        low = high = least_s * (1 + 1e-9)
        while self.sum_s(options, high) > high * (1 + 1e-12):
            low, high = high, 1.5 * high
        for _ in range(_HALVINGS):
            if high - low <= _ENOUGH * low:
                break
            middle = (low + high) / 2
            low, high = (low, middle) if self.sum_s(options, middle) <= middle else (middle, high)
        return Relaxed(high, min(low, high * (1 - 1e-8)), self._shares(options, high))

    def prompts(self, options: Options) -> list[Relaxed]:
        """For several times that the slowest node may take for a chunk: what all chunks of a prompt take then. Nothing
        is below the least `bound_s`."""
        free = self._capped(options, np.inf)
        if free is None:
            return []
        n_more, found = options.n_chunks - 1, list[Relaxed]()
        below_s, first = self._least_cap(options, free.time_s)
        for cap in np.geomspace(first, max(first, free.time_s), _CAPS) if n_more else ():
            capped = self._capped(options, float(cap))
            if capped is not None:
                bound_s = capped.time_s + n_more * below_s
                found.append(Relaxed(capped.time_s + n_more * float(cap), bound_s, capped.shares))
            below_s = float(cap)
        return [*found, Relaxed(free.time_s * options.n_chunks, free.time_s + n_more * below_s, free.shares)]

    def _least_cap(self, options: Options, high: float) -> tuple[float, float]:
        """Times of the slowest node: one with which there is nothing, and a little more, with which there is."""
        low = 0.0
        for _ in range(_CAPS):
            middle = (low + high) / 2
            can_be = np.isfinite(self.sum_s(replace(options, slowest_s=middle), np.inf))
            low, high = (low, middle) if can_be else (middle, high)
        return low, high

    def _capped(self, options: Options, slowest_s: float) -> Relaxed | None:
        asked = replace(options, slowest_s=slowest_s)
        time_s = self.sum_s(asked, np.inf)
        return Relaxed(time_s, time_s, self._shares(asked, np.inf)) if np.isfinite(time_s) else None

    def sum_s(self, options: Options, time_s: float) -> float:
        """The least sum of costs in a pass of so many seconds; infinite where there is none."""
        costs = self.costs(options, time_s).min(axis=(1, 2))
        sums = costs[0]
        for cost in costs[1:]:
            sums = _joined(sums, cost).min(axis=1)
        return max(float(sums[-1]) + self.rest_s, options.n_steps * self.cluster.output_s)

    def _shares(self, options: Options, time_s: float) -> tuple[Share, ...]:
        table = self.costs(options, time_s)
        costs = table.min(axis=(1, 2))
        sums = [costs[0]]
        for cost in costs[1:]:
            sums.append(_joined(sums[-1], cost).min(axis=1))
        left, shares = self.cluster.n_layers, []
        for index in range(len(costs) - 1, -1, -1):
            own = left
            if index:
                own = int(np.argmin(_joined(sums[index - 1], costs[index])[left]))
            if own:
                shares.append(self._share(index, own, table[index, :, :, own], options.visits))
            left -= own
        return tuple(shares[::-1])

    def _share(self, index: int, n_layers: int, costs: Floats, visits: Sequence[int]) -> Share:
        way, number = np.unravel_index(int(np.argmin(costs)), costs.shape)
        counts = tuple(int(count[n_layers]) for count in self._tables.counts[index][way])
        return Share(
            index, counts, min(visits[int(number)], n_layers), bool(self._tables.over[index, way, n_layers] > 0)
        )

    def costs(self, options: Options, time_s: float) -> Floats:
        """By node, way to fill it, number of visits and of layers; infinite where it cannot be."""
        if options.n_chunks:
            return self._prompt_costs(options)
        t = self._tables
        v = np.array(options.visits, dtype=np.float64)[None, None, :, None]
        share = np.array(options.disk_share or (1.0,) * len(t.rates))
        rates = (t.rates * share)[:, None, None, None]
        over, least = t.over[:, :, None, :], t.least[:, :, None, :]
        streams = over > 0
        n_layers = np.arange(t.over.shape[-1])[None, None, None, :]
        with np.errstate(invalid="ignore", divide="ignore"):
            beside = t.beside[:, None, None, None]
            n_hidden, read = np.where(beside, v, v - 1), time_s * rates - over
            most = np.minimum(t.room[:, :, None, :], np.where(beside & (read >= 0), np.inf, read))
            buffers = np.clip(np.where(n_hidden, over / np.maximum(n_hidden, 1), 0.0), least, np.maximum(least, most))
            exposed_s = np.maximum(0.0, over - n_hidden * buffers) / rates
            stall_s = np.maximum(0.0, exposed_s - t.compute_s[:, :, None, :])
        hop_s = t.hops[:, None, None, None] * v - t.free_hops[:, None, None, None]
        cost = t.compute_s[:, :, None, :] + hop_s + np.where(streams, stall_s + t.demanded_s[:, :, None, :], 0.0)
        possible = t.possible[:, :, None, :] & (~streams | (options.streams & (most >= least)))
        if options.n_steps > 1:
            possible &= options.n_steps * (t.compute_s + t.ends_s)[:, :, None, :] <= time_s
        cost = np.where(possible & (v <= np.maximum(n_layers, 1)), cost, np.inf)
        return _with_nothing(cost, options)

    def _prompt_costs(self, options: Options) -> Floats:
        """Every node is visited once. The first chunk waits for reading that its computing does not hide; if not in one
        round, other nodes' computing may."""
        t = self._tables
        reading_s = np.where(t.over > 0, (t.over + t.least) / t.rates[:, None, None], 0.0)
        first_s = t.compute_s if self.hopeful else np.maximum(t.compute_s, reading_s)
        took_s = first_s + np.where(t.over > 0, t.demanded_s, 0.0)
        further_s = np.maximum(t.compute_s + t.ends_s, reading_s * options.reading)
        hop_s = (t.hops - t.free_hops)[:, None, None]
        possible = t.possible & (options.streams | (t.over == 0)) & (further_s <= options.slowest_s)
        return _with_nothing(np.where(possible, took_s + hop_s, np.inf)[:, :, None, :], options)


def _with_nothing(cost: Floats, options: Options) -> Floats:
    """No layers cost nothing; who is left out takes none."""
    cost[list(options.without)] = np.inf
    cost[:, :, :, 0] = 0.0
    return cost


def _joined(sums: Floats, cost: Floats) -> Floats:
    """`[n, k]`: n layers of which the next node takes k."""
    n = len(sums)
    padded = np.concatenate([np.full(n - 1, np.inf), sums])
    return np.lib.stride_tricks.sliding_window_view(padded, n)[:, ::-1] + cost[None, :]


# ---------------------------------------------------------------- tables


def _into(cluster: Cluster, index: int, hopeful: bool) -> float:
    """The usual link to a node, or the quickest."""
    links = [hops[index] for source, hops in enumerate(cluster.hop_s) if source != index]
    return float(min(links) if hopeful else np.mean(links)) if links else 0.0


def _out_s(cluster: Cluster, hopeful: bool) -> float:
    if cluster.output.member != cluster.head:
        return cluster.back_s
    links = [hop_s for source, hop_s in enumerate(cluster.to_output_s) if source != cluster.head]
    return float(min(links) if hopeful else np.mean(links)) if links else 0.0


def _tables(cluster: Cluster, by_largest: bool, hopeful: bool) -> _Tables:
    filled = [_ways(cluster, member, by_largest, hopeful) for member in cluster.members]
    n_ways = max(len(ways) for ways in filled)
    for ways in filled:
        ways += [ways[0]] * (n_ways - len(ways))

    def stacked(name: str) -> Floats:
        return np.array([[getattr(way, name) for way in ways] for ways in filled])

    into = [_into(cluster, member.index, hopeful) for member in cluster.members]
    return _Tables(
        counts=[[way.counts for way in ways] for ways in filled],
        compute_s=stacked("compute_s"),
        over=stacked("over"),
        demanded_s=stacked("demanded_s"),
        room=stacked("room"),
        least=stacked("least"),
        possible=stacked("possible").astype(bool),
        beside=np.array([bool(member.streaming and not member.streaming.shares_host) for member in cluster.members]),
        rates=np.array([member.disk_bytes_s or np.inf for member in cluster.members]),
        hops=np.array(into),
        ends_s=np.array([[[cluster.output_s if m.index == cluster.output.member else 0.0]] for m in cluster.members]),
        free_hops=np.array([hop if index == cluster.head else 0.0 for index, hop in enumerate(into)]),
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to fill a node's devices, for every number of layers; `counts` by place."""

    counts: NDArray[np.int64]
    compute_s: Floats
    over: Floats
    demanded_s: Floats
    room: Floats
    least: Floats
    possible: NDArray[np.bool_]


def _ways(cluster: Cluster, member: Member, by_largest: bool, hopeful: bool) -> list[_Way]:
    fast_first = sorted(member.places, key=lambda place: -place.bytes_s)
    own_first = sorted(fast_first, key=lambda place: place.shares_host)
    shapes: dict[tuple[tuple[int, ...], float], list[Place]] = {}
    for order in (fast_first, own_first):
        for part in (1.0, 0.8, 0.5, 0.0):  # of accelerators in the host's memory: what streams must lie elsewhere
            shapes.setdefault((tuple(place.number for place in order), part), order)
    ways: dict[bytes, _Way] = {}
    for (_, part), order in shapes.items():
        way = _way(cluster, member, order, part, by_largest, hopeful)
        ways.setdefault(way.counts.tobytes(), way)
    return list(ways.values())


def _way(
    cluster: Cluster, member: Member, order: Sequence[Place], part: float, by_largest: bool, hopeful: bool
) -> _Way:
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
) -> _Way:
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
        return _Way(counts, compute_s, nothing, nothing, nothing, nothing, possible & (host <= member.memory_bytes))
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
) -> _Way:
    streaming, model = member.streaming, cluster.problem.model
    assert streaming is not None
    size = _size(streaming, by_largest)
    table = streaming.table_bytes
    gather = min(GATHER_BYTES, member.memory_bytes // GATHER_SHARE)
    host, room = member.memory_bytes - taken, np.full_like(taken, float(streaming.memory_bytes))
    in_host = np.minimum(room, host) if streaming.shares_host else room
    room = in_host - own * cluster.kv_bytes
    weights, lost = own * size + streaming.fixed_bytes - table, float(gather) if streaming.shares_host else 0.0
    if streaming.device.copies:
        lost += 0.0 if hopeful else most_slots(cluster.problem, streaming.device)
    over = np.where(fits | (weights <= room), 0.0, np.maximum(0.0, weights - room + lost))
    room = room - lost if streaming.shares_host else host - gather  # of the buffer
    experts = own * (sum(model.expert_bytes) / cluster.n_layers) if model.expert_bytes else np.zeros_like(over)
    demanded = np.minimum(over, experts)
    routed = (sum(model.expert_bytes) / cluster.n_layers) * cluster.routed if model.expert_bytes else 0.0
    least = np.where(over > 0, float(LEAST_BUFFER_BYTES), 0.0)
    if not hopeful:
        least = _least(cluster, member, over - demanded, own, size, routed)
    return _Way(
        counts=counts,
        compute_s=compute_s,
        over=over - demanded,
        demanded_s=demanded * cluster.routed / member.disk_bytes_s,
        room=np.maximum(room, 0.0),
        least=least,
        possible=possible & ((over == 0) | ((least <= room) & (over <= weights))),
    )


def _least(
    cluster: Cluster, member: Member, over: Floats, own: NDArray[np.int64], size: float, routed: float
) -> Floats:
    """The smallest buffers, as `Overload` has them; of single tensors a layer's share can be made up better."""
    largest = min(cluster.problem.model.largest_tensor_bytes or size, size)
    least, spare = np.where(over > 0, float(LEAST_BUFFER_BYTES), 0.0), 2.5 if cluster.reads_alone(member) else 1.5
    for _ in range(_ROUNDS):
        share = np.minimum(size, (over + least) / np.maximum(own, 1) + routed)
        wanted = share + spare * largest if cluster.problem.model.tensor_bytes else 2 * share + largest
        least = np.where(over > 0, np.maximum(LEAST_BUFFER_BYTES, wanted), 0.0)
    return least


def _size(place: Place, by_largest: bool) -> float:
    return float(max(place.sizes)) if by_largest else sum(place.sizes) / len(place.sizes)
