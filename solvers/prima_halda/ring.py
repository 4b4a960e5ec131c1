"""In which order nodes are visited: the shortest way round, from measured links. Exact up to a dozen nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

EXACT_UP_TO = 11
"""Nodes besides the head for which the shortest way is found by Held and Karp's dynamic programming."""


def shortest_ring(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    """The head, then the others, each once. Of equally long ways the first as given."""
    others = tuple(others)
    if _are_alike(hop_s, (head, *others)):
        return (head, *others)
    if len(others) <= EXACT_UP_TO:
        return (head, *_held_karp(hop_s, head, others))
    return (head, *_improved(hop_s, head, _nearest_first(hop_s, head, others)))


def ring_s(hop_s: Sequence[Sequence[float]], ring: Sequence[int]) -> float:
    return sum(hop_s[a][b] for a, b in pairwise((*ring, ring[0])))


def _are_alike(hop_s: Sequence[Sequence[float]], nodes: Sequence[int]) -> bool:
    return len({hop_s[a][b] for a in nodes for b in nodes if a != b}) <= 1


def _held_karp(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    """`best[visited][last]`: the shortest way from the head through these nodes (bits) to the last of them."""
    n = len(others)
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{} for _ in range(1 << n)]
    for last in range(n):
        best[1 << last][last] = (hop_s[head][others[last]], (last,))
    for visited in range(1 << n):
        for last, (length, way) in best[visited].items():
            for to in range(n):
                if not visited >> to & 1:
                    longer = (length + hop_s[others[last]][others[to]], (*way, to))
                    known = best[visited | 1 << to].get(to)
                    if known is None or longer < known:
                        best[visited | 1 << to][to] = longer
    ends = best[-1].items()
    _, way = min((length + hop_s[others[last]][head], way) for last, (length, way) in ends)
    return tuple(others[index] for index in way)


def _nearest_first(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    left, way = list(others), [head]
    while left:
        nearest = min(left, key=lambda node: hop_s[way[-1]][node])
        left.remove(nearest)
        way.append(nearest)
    return tuple(way[1:])


def _improved(hop_s: Sequence[Sequence[float]], head: int, way: tuple[int, ...]) -> tuple[int, ...]:
    """By moving runs of up to three nodes elsewhere and turning runs round, as long as that helps."""
    while True:
        length = ring_s(hop_s, (head, *way))
        better = min(_neighbours(way), key=lambda other: ring_s(hop_s, (head, *other)))
        if ring_s(hop_s, (head, *better)) >= length * (1 - 1e-12):
            return way
        way = better


def _neighbours(way: tuple[int, ...]) -> list[tuple[int, ...]]:
    n = len(way)
    turned = [(*way[:i], *way[i:j][::-1], *way[j:]) for i in range(n) for j in range(i + 2, n + 1)]
    moved = []
    for i in range(n):
        for j in range(i + 1, min(i + 3, n) + 1):
            rest = (*way[:i], *way[j:])
            moved += [(*rest[:k], *way[i:j], *rest[k:]) for k in range(len(rest) + 1) if k != i]
    return turned + moved
