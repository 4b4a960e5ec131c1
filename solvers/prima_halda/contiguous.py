"""Every node visited at most once, all weights kept: the best cuts, exact for nodes in a given order, by dynamic
programming over them. Other than the relaxation it knows how large each layer is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_halda.cluster import Cluster, Member, Place
from prima_halda.memory import Way

Floats = NDArray[np.float64]
"""`[i, j]`: of the layers from i up to j."""


def contiguous(cluster: Cluster, orders: Sequence[Sequence[int]]) -> Iterator[Way]:
    """For each order of the nodes the least sum of computing and of links, each its usual one; none where they cannot
    hold all layers so. Nodes that are not worth it get none."""
    if not _may_fit(cluster):
        return
    runs = [_runs(cluster, member) for member in cluster.members]
    for order in orders:
        if (way := _in_this_order(cluster, [runs[index] for index in order])) is not None:
            yield way


def _may_fit(cluster: Cluster) -> bool:
    """Whether there is as much memory as layers take, if each is where it takes least."""
    least = sum(min(place.sizes[layer] for place in cluster.places) for layer in range(cluster.n_layers))
    room = sum(node.room_bytes for node in cluster.problem.nodes)
    return least + cluster.n_layers * cluster.kv_bytes <= room


def _in_this_order(cluster: Cluster, nodes: Sequence[list[_Runs]]) -> Way | None:
    costs = [np.minimum.reduce([runs.cost_s for runs in own]) for own in nodes]
    best = [np.concatenate([[0.0], np.full(cluster.n_layers, np.inf)])]
    for cost in costs:
        best.append((best[-1][:, None] + cost).min(axis=0))
    if not np.isfinite(best[-1][-1]):
        return None
    way: list[int] = []
    stop = cluster.n_layers
    for before, cost, own in zip(best[-2::-1], costs[::-1], nodes[::-1], strict=True):
        start = int((before + cost[:, stop]).argmin())
        way = [*min(own, key=lambda runs: runs.cost_s[start, stop]).places(start, stop), *way]
        stop = start
    return tuple(way)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Of a node with its places in some order: what a run of layers costs; `parts`: what the first places, one more
    each time, and the next place alone would."""

    order: tuple[Place, ...]
    cost_s: Floats
    parts: tuple[tuple[Floats, Floats], ...]

    def places(self, start: int, stop: int) -> list[int]:
        way: list[int] = []
        for (first, last), place in zip(self.parts[::-1], self.order[:0:-1], strict=True):
            cut = int((first[start] + last[:, stop]).argmin())
            way = [place.number] * (stop - cut) + way
            stop = cut
        return [self.order[0].number] * (stop - start) + way


def _runs(cluster: Cluster, member: Member) -> list[_Runs]:
    """With its places as given, and the other way round."""
    orders = (member.places, member.places[::-1])
    return [_in_order(cluster, member, order) for order in orders[: len(member.places)]]


def _in_order(cluster: Cluster, member: Member, order: tuple[Place, ...]) -> _Runs:
    cost, parts = _alone(cluster, order[0]), []
    for place in order[1:]:
        own = _alone(cluster, place)
        parts.append((cost, own))
        cost = _sum_of_parts(cost, own)
    layers = np.arange(cluster.n_layers + 1)
    used = layers[None, :] > layers[:, None]
    cost = np.where(used & (_host_bytes(cluster, member) > member.memory_bytes), np.inf, cost)
    links = [hops[member.index] for source, hops in enumerate(cluster.hop_s) if source != member.index]
    hop_s = float(np.mean(links)) if links and member.index != cluster.head else 0.0
    return _Runs(order, cost + hop_s * used, tuple(parts))


def _sum_of_parts(first: Floats, last: Floats) -> Floats:
    """The least over all cuts between."""
    least = np.full_like(first, np.inf)
    for cut in range(len(first)):
        np.minimum(least, first[:, cut, None] + last[None, cut, :], out=least)
    return least


def _alone(cluster: Cluster, place: Place) -> Floats:
    """Of runs on this place; infinite where they do not fit, or end before they begin."""
    ends_s, n_bytes = np.array(place.ends_s), _bytes(cluster, place)
    cost = ends_s[None, :] - ends_s[:, None]
    possible = (n_bytes == 0) | (n_bytes + place.fixed_bytes <= place.memory_bytes)
    return np.where(np.triu(possible), cost, np.inf)


def _bytes(cluster: Cluster, place: Place) -> NDArray[np.int64]:
    sizes = np.array(place.sizes, dtype=np.int64) + cluster.kv_bytes
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    taken: NDArray[np.int64] = ends[None, :] - ends[:, None]
    return taken


def _host_bytes(cluster: Cluster, member: Member) -> NDArray[np.int64]:
    """What a run takes of the host's memory, at least: all that no memory of a place's own could hold."""
    sharing = [place for place in member.places if place.shares_host]
    if not sharing:
        return np.zeros((cluster.n_layers + 1,) * 2, dtype=np.int64)
    own = sum(place.memory_bytes - place.fixed_bytes for place in member.places if not place.shares_host)
    fixed = sum(place.fixed_bytes for place in sharing)
    return _bytes(cluster, sharing[-1]) + np.int64(fixed - own)
