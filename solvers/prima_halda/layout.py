"""From shares to a way: the layers of each node spread over its visits, the visits laid out in rounds."""

from __future__ import annotations

from collections.abc import Sequence

from prima_halda.cluster import Cluster
from prima_halda.memory import Way
from prima_halda.relax import Share


def laid_out(cluster: Cluster, shares: Sequence[Share], ring: Sequence[int]) -> Way:
    """In as many rounds as the most visited node has visits. Who is visited less often is so in rounds that are evenly
    spaced, or if only once, where there is least to do: who reads needs time between his visits."""
    n_rounds = max(share.n_visits for share in shares)
    by_member = {share.member: share for share in shares}
    ordered = [by_member[index] for index in ring if index in by_member]
    rounds = _rounds(cluster, ordered, n_rounds)
    seen = dict.fromkeys(by_member, 0)
    way: list[int] = []
    for members in rounds:
        for share in ordered:
            if share.member in members:
                way += _visit(cluster, share, seen[share.member])
                seen[share.member] += 1
    return tuple(way)


def _rounds(cluster: Cluster, shares: Sequence[Share], n_rounds: int) -> list[set[int]]:
    """Who is visited in each."""
    rounds: list[set[int]] = [set() for _ in range(n_rounds)]
    work_s = [0.0] * n_rounds
    for share in sorted(shares, key=lambda share: -share.n_visits):
        each_s = _compute_s(cluster, share) / share.n_visits
        if share.n_visits > 1:
            for visit in range(share.n_visits):
                number = visit * n_rounds // share.n_visits
                rounds[number].add(share.member)
                work_s[number] += each_s
    once = sorted((share for share in shares if share.n_visits == 1), key=lambda share: -_compute_s(cluster, share))
    for share in once:
        number = work_s.index(min(work_s))
        rounds[number].add(share.member)
        work_s[number] += _compute_s(cluster, share)
    return rounds


def _compute_s(cluster: Cluster, share: Share) -> float:
    places = cluster.members[share.member].places
    return sum(place.ends_s[-1] * n / cluster.n_layers for place, n in zip(places, share.counts, strict=True))


def _visit(cluster: Cluster, share: Share, number: int) -> list[int]:
    """The places of a visit's layers: who streams comes last, and reads while the others compute."""
    member = cluster.members[share.member]
    way: list[int] = []
    for place, count in sorted(
        zip(member.places, share.counts, strict=True), key=lambda item: item[0] is member.streaming
    ):
        n = (number + 1) * count // share.n_visits - number * count // share.n_visits
        way += [place.number] * n
    return way
