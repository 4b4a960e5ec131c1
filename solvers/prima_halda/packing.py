"""Layers of odd sizes in memory that is just enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations

from prima_halda.cluster import Cluster, Place
from prima_halda.memory import Way

FEW_PLACES = 5
Fullest = Callable[[int, tuple[int, ...], int], tuple[int, ...]]
"""Which layers are taken by a place, of those that are left, for so much room."""
_MOST_SUMS = 512
"""Sums of layers that are told apart."""


def packings(cluster: Cluster) -> Iterator[Way]:
    """One place after another is filled as full as can be, in every order where there are few of them: so that the
    last, which may be the slowest, has least."""
    if len(cluster.places) <= FEW_PLACES:
        fullest = cache(lambda number, left, room: _fullest(cluster, cluster.places[number], left, room))
        for order in permutations(cluster.places):
            yield _filled(cluster, order, fullest)


def _filled(cluster: Cluster, order: Sequence[Place], fullest: Fullest) -> Way:
    rooms, hosts = _rooms(cluster)
    way, left = [_last_resort(cluster)] * cluster.n_layers, tuple(range(cluster.n_layers))
    for place in order:
        taken = fullest(place.number, left, _room(place, rooms, hosts))
        for layer in taken:
            way[layer] = place.number
            if place.shares_host:
                hosts[place.member] -= place.sizes[layer] + cluster.kv_bytes
        left = tuple(layer for layer in left if layer not in taken)
    return tuple(way)


def _fullest(cluster: Cluster, place: Place, layers: Sequence[int], room: int) -> tuple[int, ...]:
    """The layers that together take the most of the room."""
    sums: dict[int, tuple[int, ...]] = {0: ()}
    for layer in layers:
        size = place.sizes[layer] + cluster.kv_bytes
        longer = {total + size: (*own, layer) for total, own in sums.items() if total + size <= room}
        sums = dict(sorted({**longer, **sums}.items(), reverse=True)[:_MOST_SUMS])
    return sums[max(sums)]


def packed(cluster: Cluster) -> Way:
    """The largest layer first, each where the least room is left. What fits nowhere lies where it can be read from
    disk, if anywhere; so not every such way can be."""
    rooms, hosts = _rooms(cluster)
    way = [_last_resort(cluster)] * cluster.n_layers
    for layer in sorted(range(cluster.n_layers), key=lambda layer: -cluster.problem.model.layer_bytes[layer]):
        left = {
            place.number: room
            for place in cluster.places
            if (room := _room(place, rooms, hosts) - place.sizes[layer] - cluster.kv_bytes) >= 0
        }
        if left:
            place = cluster.places[min(left, key=lambda number: left[number])]
            way[layer] = place.number
            rooms[place.number] -= place.sizes[layer] + cluster.kv_bytes
            hosts[place.member] -= place.sizes[layer] + cluster.kv_bytes if place.shares_host else 0
    return tuple(way)


def _rooms(cluster: Cluster) -> tuple[list[int], list[int]]:
    """Of the places, and of the hosts, beside the model's ends."""
    hosts = [member.memory_bytes for member in cluster.members]
    for place in cluster.places:
        hosts[place.member] -= place.fixed_bytes if place.shares_host else 0
    return [place.memory_bytes - place.fixed_bytes for place in cluster.places], hosts


def _room(place: Place, rooms: list[int], hosts: list[int]) -> int:
    return min(rooms[place.number], hosts[place.member]) if place.shares_host else rooms[place.number]


def _last_resort(cluster: Cluster) -> int:
    """The streaming place of the node with the fastest disk."""
    streaming = [member for member in cluster.members if member.streaming is not None]
    fastest = max(streaming, key=lambda member: member.disk_bytes_s, default=None)
    return fastest.streaming.number if fastest is not None and fastest.streaming is not None else 0
