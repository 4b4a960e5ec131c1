"""Layers of odd sizes in memory that is just enough: the largest first, each where the least room is left."""

from __future__ import annotations

from prima_halda.cluster import Cluster, Place
from prima_halda.memory import Way


def packed(cluster: Cluster) -> Way:
    """What fits nowhere lies where it can be read from disk, if anywhere; so not every such way can be."""
    rooms = [place.memory_bytes - place.fixed_bytes for place in cluster.places]
    hosts = [member.memory_bytes for member in cluster.members]
    if cluster.end.shares_host:
        hosts[cluster.head] -= cluster.end.fixed_bytes
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


def _room(place: Place, rooms: list[int], hosts: list[int]) -> int:
    return min(rooms[place.number], hosts[place.member]) if place.shares_host else rooms[place.number]


def _last_resort(cluster: Cluster) -> int:
    """The streaming place of the node with the fastest disk."""
    streaming = [member for member in cluster.members if member.streaming is not None]
    fastest = max(streaming, key=lambda member: member.disk_bytes_s, default=None)
    return fastest.streaming.number if fastest is not None and fastest.streaming is not None else 0
