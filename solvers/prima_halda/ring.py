"""In which order nodes are visited: the shortest way round, from measured links. Exact up to a dozen nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

EXACT_UP_TO = 11
"""Nodes besides the head for which the shortest way is found by Held and Karp's dynamic programming."""


def shortest_ring(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    """The head, then the others, each once; where all links are alike in the order given."""
    others = tuple(others)
    if _are_alike(hop_s, (head, *others)):
        return (head, *others)
    if len(others) <= EXACT_UP_TO:
        return (head, *_held_karp(hop_s, head, others))
    return (head, *_improved(hop_s, head, _nearest_first(hop_s, head, others)))


def ending_at(hop_s: Sequence[Sequence[float]], head: int, last: int) -> list[list[float]]:
    """The same links, but that only `last` leads back to the head: elsewhere that is much too long."""
    home_s = 1 + len(hop_s) * max(max(row) for row in hop_s)
    return [
        [to_s + home_s if b == head and a not in (head, last) else to_s for b, to_s in enumerate(row)]
        for a, row in enumerate(hop_s)
    ]


def ring_s(hop_s: Sequence[Sequence[float]], ring: Sequence[int]) -> float:
    return sum(hop_s[a][b] for a, b in pairwise((*ring, ring[0])))


def _are_alike(hop_s: Sequence[Sequence[float]], nodes: Sequence[int]) -> bool:
    return len({hop_s[a][b] for a in nodes for b in nodes if a != b}) <= 1


def _held_karp(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    """`best[visited, last]`: the shortest way from the head through these nodes (bits) to the last of them. All sets of
    so many nodes at once."""
    n = len(others)
    hops = np.array([[hop_s[a][b] for b in others] for a in others])
    visited = np.arange(1 << n)
    n_visited = sum((visited >> node & 1 for node in range(n)), np.zeros_like(visited))
    best = np.full((1 << n, n), np.inf)
    best[1 << np.arange(n), np.arange(n)] = [hop_s[head][node] for node in others]
    for size in range(2, n + 1):
        sets = visited[n_visited == size]
        for last in range(n):
            with_it = sets[sets >> last & 1 == 1]
            best[with_it, last] = (best[with_it ^ 1 << last] + hops[:, last]).min(axis=1)
    way, left, home_s = list[int](), (1 << n) - 1, np.array([hop_s[node][head] for node in others])
    while left:
        last = n - 1 - int((best[left] + home_s)[::-1].argmin())  # of equals in the order given
        way.append(others[last])
        left, home_s = left ^ 1 << last, hops[:, last]
    return tuple(way[::-1])


def _nearest_first(hop_s: Sequence[Sequence[float]], head: int, others: Sequence[int]) -> tuple[int, ...]:
    left, way = list(others), [head]
    while left:
        nearest = min(left, key=lambda node: hop_s[way[-1]][node])
        left.remove(nearest)
        way.append(nearest)
    return tuple(way[1:])


def _improved(hop_s: Sequence[Sequence[float]], head: int, way: tuple[int, ...]) -> tuple[int, ...]:
    """By moving runs of up to three nodes elsewhere and turning runs round, as long as that helps."""
    hops, changes = np.array(hop_s), np.array(_changes(len(way)))
    nodes, length = np.array(way), ring_s(hop_s, (head, *way))
    while True:
        changed = nodes[changes]
        ends_s = hops[head, changed[:, 0]] + hops[changed[:, -1], head]
        lengths = ends_s + hops[changed[:, :-1], changed[:, 1:]].sum(axis=1)
        best = int(lengths.argmin())
        if lengths[best] >= length * (1 - 1e-12):
            return tuple(int(node) for node in nodes)
        nodes, length = changed[best], float(lengths[best])


def _changes(n: int) -> list[tuple[int, ...]]:
    """Orders of so many that one change leads to."""
    way = tuple(range(n))
    turned = [(*way[:i], *way[i:j][::-1], *way[j:]) for i in range(n) for j in range(i + 2, n + 1)]
    moved = []
    for i in range(n):
        for j in range(i + 1, min(i + 3, n) + 1):
            rest = (*way[:i], *way[j:])
            moved += [(*rest[:k], *way[i:j], *rest[k:]) for k in range(len(rest) + 1) if k != i]
    return turned + moved
