"""The relaxation: how many layers each node takes, on which of its devices, in how many visits, and which node has the
output part. Exact by dynamic programming, of a simpler question: layers are all alike, visits are evenly spaced, and
every visit costs the node's usual link, whoever was before.

`cost(l; T)` is the least that a node with l layers adds to a pass of T seconds: its computing, what of its reading
nothing hides, and its links. Without T it could read as much as it likes ahead; in T seconds its disk reads no more
than T times its rate. It falls as T grows, so for the least T that is as long as the sum of all costs any other T is
either too short, and then its sum is too long, or the other way round: both ends close in on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_halda.cluster import Cluster
from prima_halda.filling import Filling, Floats, fillings

VISITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_TRIALS = 40
_CAPS = 12
"""Times of the slowest node that are tried for a prompt."""
_NEAR, _NEARER = 1e-3, 1e-5
"""Between both ends, for a start, and for a bound."""


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
    """`time_s` is as long as the sum of its costs; nothing below `bound_s` is, which is hardly smaller. `output`: the
    node with the output part."""

    time_s: float
    bound_s: float
    shares: tuple[Share, ...]
    output: int


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked: `visits` that nodes may have, and `disk_share`: of its disk's rate that a node gets.

    `streams`: whether weights may be read at all. `without`: nodes that get nothing. `output`: the node that has to
    have the output part (None: any). `n_steps` follow each other in a pass, so no node may take more than its part of
    the time. `n_chunks` of a prompt (0: it is not about one): then a node reads while it computes a chunk, for all but
    the first this part of its weights, and takes at most `slowest_s`.
    """

    visits: tuple[int, ...] = VISITS
    disk_share: tuple[float, ...] = ()
    streams: bool = True
    without: frozenset[int] = frozenset()
    output: int | None = None
    n_steps: int = 1
    n_chunks: int = 0
    reading: float = 1.0
    slowest_s: float = np.inf


@dataclass(frozen=True, slots=True)
class _Role:
    """A node with the output part or without. Where it has it there is more to pay: computing it, and its links where
    the node computes no layer (`to_s`), one visit's (`once_s`), or more (`often_s`)."""

    member: int
    has_output: bool
    fillings: list[Filling]
    output_s: float = 0.0
    to_s: float = 0.0
    once_s: float = 0.0
    often_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Tables:
    """Of every role's ways to fill its devices (first axis) and numbers of layers (last)."""

    members: NDArray[np.int64]
    compute_s: Floats
    passing: Floats
    over: Floats
    demanded_s: Floats
    room: Floats
    least: Floats
    possible: NDArray[np.bool_]
    rates: Floats
    hops: Floats
    free_hops: Floats
    ends: Floats
    has_output: NDArray[np.bool_]

    def cut(self, n_numbers: int) -> _Tables:
        """For fewer layers."""
        names = ("compute_s", "passing", "over", "demanded_s", "room", "least", "possible")
        return replace(self, **{name: getattr(self, name)[:, :n_numbers] for name in names})


_State = tuple[Floats | None, Floats | None]
"""The least sums of the first nodes for every number of layers: none of them has the output part, or one has it. And
of a node its costs, without and with it. None: not asked about."""


class Relaxation:
    """Of clusters that differ in the node with the output part, asked with several options. `by_largest`: layers are
    taken as large as the largest. `hopeful`: links are the quickest, buffers may be as small as can be; then no plan is
    faster than `bound_s`, but for one on the head alone."""

    def __init__(self, cluster: Cluster, roles: Sequence[_Role], hopeful: bool) -> None:
        self.cluster = cluster
        self.hopeful = hopeful
        self._roles = roles
        self._starts = [0, *accumulate(len(role.fillings) for role in self._roles)]
        self._tables = _tables(self.cluster, self._roles, hopeful)

    @classmethod
    def of(cls, clusters: Sequence[Cluster], *, by_largest: bool = False, hopeful: bool = False) -> Relaxation:
        return cls(clusters[0], list(_roles(clusters, by_largest, hopeful)), hopeful)

    def with_outputs(self, outputs: Collection[int]) -> Relaxation:
        """The same, but only these nodes may have the output part."""
        roles = [role for role in self._roles if not role.has_output or role.member in outputs]
        return Relaxation(self.cluster, roles, self.hopeful)

    def solve(self, options: Options) -> Relaxed | None:
        """None: it cannot be. The head's own layers cost no links: activations begin and end there."""
        low = self.sum_s(options, np.inf)  # with all the time there is, what can be at all
        if not np.isfinite(low):
            return None
        time_s, high = low * (1 + 1e-9), np.inf
        for _ in range(_TRIALS):
            sum_s = self.sum_s(options, time_s)
            low, high = (time_s, min(high, sum_s)) if sum_s > time_s else (max(low, sum_s), time_s)
            if high - low <= (_NEARER if self.hopeful else _NEAR) * low:
                break
            time_s = (low + high) / 2 if np.isfinite(high) else 1.5 * low
        return self._relaxed(options, high, min(low, high * (1 - 1e-8)))

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
                time_s, bound_s = capped.time_s + n_more * float(cap), capped.time_s + n_more * below_s
                found.append(replace(capped, time_s=time_s, bound_s=bound_s))
            below_s = float(cap)
        return [
            *found,
            replace(free, time_s=free.time_s * options.n_chunks, bound_s=free.time_s + n_more * below_s),
        ]

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
        return self._relaxed(asked, np.inf, time_s, time_s) if np.isfinite(time_s) else None

    def sum_s(self, options: Options, time_s: float) -> float:
        """The least sum of costs in a pass of so many seconds; infinite where there is none."""
        _, sums = self._states(self.of_nodes(options, time_s))[-1]
        return float(sums[-1]) if sums is not None else np.inf

    def by_output(self, options: Options, time_s: float) -> dict[int, float]:
        """The least sums for each node that may have the output part."""
        costs = self.of_nodes(options, time_s)
        free = [(cost, None) for cost, _ in costs]
        before, behind = self._states(free), self._states(free[::-1])[::-1]
        found = {}
        for index, (_, held) in enumerate(costs):
            sums, rest = before[index][0], behind[index + 1][0]
            if held is not None and sums is not None and rest is not None:
                found[index] = float((_joined(sums, held) + rest[::-1]).min())
        return found

    def of_nodes(self, options: Options, time_s: float) -> list[_State]:
        """Of every node the costs by number of layers, without the output part and with it."""
        costs = self.costs(options, time_s).min(axis=1)
        found: list[list[Floats | None]] = [[None, None] for _ in self.cluster.members]
        for role, cost in zip(self._roles, np.minimum.reduceat(costs, self._starts[:-1]), strict=True):
            may_have = options.output in (None, role.member) and role.member not in options.without
            if not role.has_output or may_have:
                can_be = np.isfinite(cost).nonzero()[0]
                found[role.member][role.has_output] = cost[: can_be[-1] + 1] if len(can_be) else None
        return [(free, held) for free, held in found]

    # ------------------------------------------------------------ dynamic programming

    def _states(self, costs: Sequence[_State]) -> list[_State]:
        """Before the first node, and behind each."""
        nothing = np.full(self.cluster.n_layers + 1, np.inf)
        nothing[0] = 0.0
        states: list[_State] = [(nothing, None)]
        for free, held in costs:
            without, having = states[-1]
            sums = [
                _joined(before, cost)
                for before, cost in ((having, free), (without, held))
                if before is not None and cost is not None
            ]
            goes_on = _joined(without, free) if without is not None and free is not None else None
            states.append((goes_on, np.minimum.reduce(sums) if sums else None))
        return states

    def _relaxed(self, options: Options, time_s: float, bound_s: float, sum_s: float | None = None) -> Relaxed:
        table, costs = self.costs(options, time_s), self.of_nodes(options, time_s)
        states, left, output = self._states(costs), self.cluster.n_layers, -1
        shares = list[Share]()
        for index in range(len(costs) - 1, -1, -1):
            ways = list(_last_steps(states[index], costs[index], left, has_output=output < 0))
            _, own, has_output = min(ways)
            if has_output:
                output = index
            if own:
                shares.append(self._share(index, has_output, own, table, options.visits))
            left -= own
        return Relaxed(time_s if sum_s is None else sum_s, bound_s, tuple(shares[::-1]), output)

    def _share(self, index: int, has_output: bool, n_layers: int, table: Floats, visits: Sequence[int]) -> Share:
        number, role = next(
            (number, role)
            for number, role in enumerate(self._roles)
            if role.member == index and role.has_output == has_output
        )
        costs = table[self._starts[number] : self._starts[number + 1], :, n_layers]
        way, visit = np.unravel_index(int(np.argmin(costs)), costs.shape)
        filling = role.fillings[int(way)]
        counts = tuple(int(count[n_layers]) for count in filling.counts)
        return Share(index, counts, min(visits[int(visit)], n_layers), bool(filling.over[n_layers] > 0))

    # ------------------------------------------------------------ costs

    def costs(self, options: Options, time_s: float) -> Floats:
        """By role and way to fill it, number of visits and of layers, as far as there are any that can be; infinite
        where it cannot be."""
        if options.n_chunks:
            return self._prompt_costs(options)
        share = np.array(options.disk_share or (1.0,) * len(self.cluster.members))[self._tables.members]
        rates = (self._tables.rates * share)[:, None]
        t, can = self._possible(options, rates, time_s)
        n_layers = np.arange(t.over.shape[1])
        asked = np.array(options.visits)[None, :, None]
        v = np.where(n_layers > 0, asked, 1)
        is_more = self.hopeful & t.has_output[:, None] & (n_layers > 0)  # the output part's
        hidden = v - 1.0 + is_more[:, None, :]
        with np.errstate(invalid="ignore", divide="ignore"):
            read = time_s * rates - t.over
            most = np.minimum(t.room, read)
            wanted = np.where(hidden > 0, t.over[:, None, :] / np.maximum(hidden, 1), 0.0)
            buffers = np.clip(wanted, t.least[:, None, :], np.maximum(t.least, most)[:, None, :])
            exposed_s = np.maximum(0.0, t.over[:, None, :] - hidden * buffers) / rates[:, None, :]
        stall_s = np.maximum(0.0, exposed_s - (t.compute_s + t.ends[:, :1])[:, None, :])
        waiting_s = t.demanded_s[:, None, :] + np.where((t.over > 0)[:, None, :], stall_s, 0)
        links_s = (t.hops[:, None, None] * v - t.free_hops[:, None, None]) * (n_layers > 0)
        cost = t.compute_s[:, None, :] + waiting_s + links_s + _end_costs(t, v, n_layers)
        cost = np.where(can[:, None, :] & (v <= np.maximum(n_layers, 1)), cost, np.inf)
        return self._left_out(cost, options)

    def _possible(self, options: Options, rates: Floats, time_s: float) -> tuple[_Tables, NDArray[np.bool_]]:
        """What a disk can read in so much time; with no columns for more layers than any node can have."""
        t = self._tables
        with np.errstate(invalid="ignore"):
            most = np.minimum(t.room, time_s * rates - t.over)
        can = t.possible & ((t.passing == 0) | (options.streams & ((t.over == 0) | (most >= t.least))))
        if options.n_steps > 1:
            can &= options.n_steps * (t.compute_s + t.ends[:, :1]) <= time_s
        n_numbers = int(can.any(axis=0).nonzero()[0][-1]) + 1 if can.any() else 1
        return t.cut(n_numbers), can[:, :n_numbers]

    def _prompt_costs(self, options: Options) -> Floats:
        """Every node is visited once. The first chunk waits for reading that its computing does not hide."""
        t = self._tables
        n_layers = np.arange(t.over.shape[1])
        reading_s = np.where(t.over > 0, (t.over + t.least) / t.rates[:, None], 0.0)
        own_s = t.compute_s + t.ends[:, :1]
        took_s = np.maximum(own_s, reading_s) - t.ends[:, :1] + t.demanded_s
        further_s = np.maximum(own_s, reading_s * options.reading)
        hop_s = (t.hops - t.free_hops)[:, None] * (n_layers > 0)
        possible = t.possible & (options.streams | (t.passing == 0)) & (further_s <= options.slowest_s)
        cost = (took_s + hop_s)[:, None, :] + _end_costs(t, np.ones((1, 1, 1)), n_layers)
        return self._left_out(np.where(possible[:, None, :], cost, np.inf), options)

    def _left_out(self, cost: Floats, options: Options) -> Floats:
        if options.without:
            cost[np.isin(self._tables.members, list(options.without)), :, 1:] = np.inf
        return cost


def _end_costs(t: _Tables, visits: NDArray[Any], n_layers: NDArray[np.int64]) -> Floats:
    """The output part's computing and links, where a node has it."""
    output_s, to_s, once_s, often_s = (t.ends[:, column, None, None] for column in range(4))
    links_s = np.where(n_layers == 0, to_s, np.where(visits == 1, once_s, often_s))
    return np.asarray(output_s + links_s)


def _last_steps(before: _State, costs: _State, n_layers: int, *, has_output: bool) -> Iterator[tuple[float, int, bool]]:
    """What the last node may have of so many layers, and whether it has the output part, if one of these nodes does."""
    without, having = before
    free, held = costs
    kinds = ((having, free, False), (without, held, True)) if has_output else ((without, free, False),)
    for sums, cost, is_here in kinds:
        if sums is not None and cost is not None:
            n = min(n_layers + 1, len(cost))
            totals = sums[n_layers + 1 - n : n_layers + 1][::-1] + cost[:n]
            own = int(totals.argmin())
            yield float(totals[own]), own, is_here


def _joined(sums: Floats, cost: Floats) -> Floats:
    """The least for n layers of which the next node takes any number."""
    width, n = len(cost), len(sums)
    padded = np.full(width - 1 + n, np.inf)
    padded[width - 1 :] = sums
    windows = np.lib.stride_tricks.as_strided(padded, (n, width), 2 * padded.strides, writeable=False)
    return np.asarray((windows + cost[::-1]).min(axis=1))


# ---------------------------------------------------------------- tables


def _into(cluster: Cluster, index: int, hopeful: bool) -> float:
    """The usual link to a node, or the quickest."""
    return _usual([hops[index] for source, hops in enumerate(cluster.hop_s) if source != index], hopeful)


def _usual(links: Sequence[float], hopeful: bool) -> float:
    return float(min(links) if hopeful else np.mean(links)) if links else 0.0


def _roles(clusters: Sequence[Cluster], by_largest: bool, hopeful: bool) -> Iterator[_Role]:
    """Each node without the output part, if another one may have it, and with it, if it may."""
    by_output = {cluster.output.member: cluster for cluster in clusters}
    for member in clusters[0].members:
        other = next((cluster for index, cluster in by_output.items() if index != member.index), None)
        if other is not None:
            yield _Role(member.index, False, fillings(other, other.members[member.index], by_largest, hopeful))
        if member.index in by_output:
            yield _with_output(by_output[member.index], by_largest, hopeful)


def _with_output(cluster: Cluster, by_largest: bool, hopeful: bool) -> _Role:
    """Where the head has it, activations of a pass end where they began, so the last way counts; but if it is visited
    more than once, it may be the last that is."""
    index = cluster.output.member
    to_s = _usual([hop_s for source, hop_s in enumerate(cluster.to_output_s) if source != index], hopeful)
    is_head = index == cluster.head
    once_s = to_s if is_head else cluster.back_s
    often_s = 0.0 if hopeful and is_head else once_s
    ways = fillings(cluster, cluster.members[index], by_largest, hopeful)
    return _Role(index, True, ways, cluster.output_s, to_s + cluster.back_s, once_s, often_s)


def _tables(cluster: Cluster, roles: Sequence[_Role], hopeful: bool) -> _Tables:
    rows = [(role, filling) for role in roles for filling in role.fillings]

    def stacked(name: str) -> Floats:
        return np.array([getattr(filling, name) for _, filling in rows])

    members = np.array([role.member for role, _ in rows])
    into = np.array([_into(cluster, member.index, hopeful) for member in cluster.members])
    return _Tables(
        members=members,
        compute_s=stacked("compute_s"),
        passing=stacked("passing"),
        over=stacked("over"),
        demanded_s=stacked("demanded_s"),
        room=stacked("room"),
        least=stacked("least"),
        possible=stacked("possible").astype(bool),
        rates=np.array([member.disk_bytes_s or np.inf for member in cluster.members])[members],
        hops=into[members],
        free_hops=np.where(members == cluster.head, into[members], 0.0),
        ends=np.array([[role.output_s, role.to_s, role.once_s, role.often_s] for role, _ in rows]),
        has_output=np.array([role.has_output for role, _ in rows]),
    )
