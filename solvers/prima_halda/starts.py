"""Where the search begins: what the relaxation says, laid out in several manners, and what other solvers would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.pipeline import gathered_tokens, is_cpu, reading_of_further, usual_chunk
from prima_core.plan.plan import Plan
from prima_core.plan.proportional import ROUNDS, proportional
from prima_core.plan.stream import gather_bytes
from prima_halda.cluster import Cluster
from prima_halda.contiguous import contiguous
from prima_halda.judge import Judge
from prima_halda.layout import laid_out
from prima_halda.memory import Way
from prima_halda.relax import VISITS, Options, Relaxation, Relaxed, Share
from prima_halda.ring import shortest_ring

_SPREADS = (1, 2, 4, 8, 16)
_ORDERS = 2
_LEFT_OUT = 3
"""Nodes with the fewest layers that are each left out once."""


def starts(judge: Judge) -> list[Way]:
    """Of the relaxation, with layers as large as the usual one, and where they differ as the largest; and of others."""
    cluster, ways = judge.cluster, list[Way]()
    ring = cache(lambda others: shortest_ring(cluster.hop_s, cluster.head, others))
    for by_largest in (False, True):
        for found in _relaxed(judge, by_largest):
            others = tuple(share.member for share in found.shares if share.member != cluster.head)
            ways += _ways(cluster, found.shares, ring(others), cluster.problem.rounds)
        if not differs(cluster):
            break
    if not cluster.problem.rounds:
        ways += _in_one_round(cluster, ways)
    return list(dict.fromkeys([*ways, *_of_other_solvers(cluster)]))


def _in_one_round(cluster: Cluster, ways: Sequence[Way]) -> Iterator[Way]:
    """Nodes in the order in which the others visit them first, and all that they leave out, both ways round."""
    visited = (tuple(dict.fromkeys(cluster.places[number].member for number in way)) for way in ways[:_ORDERS])
    for first in dict.fromkeys(visited):
        rest = [member.index for member in cluster.members if member.index not in first]
        for order in ((*first, *rest), (*rest, *reversed(first))):
            if (way := contiguous(cluster, order)) is not None:
                yield way


def bound_s(judge: Judge) -> float:
    """No plan is faster, as far as layers are alike. One on the head alone, on whichever of its devices, needs no link:
    the relaxation counts one that leads back."""
    problem = judge.cluster.problem
    bounds = list(_hopeful_bounds(judge))
    if not problem.output:
        alone = Cluster.of(msgspec.structs.replace(problem, nodes=(problem.node(problem.head),), links=()))
        bounds += _hopeful_bounds(Judge(alone))
    return min(bounds, default=0.0)


def differs(cluster: Cluster) -> bool:
    return len(set(cluster.problem.model.layer_bytes)) > 1


def _hopeful_bounds(judge: Judge) -> Iterator[float]:
    cluster = judge.cluster
    if cluster.problem.goal is Goal.TTFT:
        for chunk in _chunks(cluster):
            hopeful = Relaxation(judge.timing(cluster.step.of(chunk, 1)).cluster, hopeful=True)
            yield from (one.bound_s for one in hopeful.prompts(_of_prompt(cluster, chunk)))
        return
    best = Relaxation(cluster, hopeful=True).solve(Options(tuple(range(1, 33))))
    if best is not None:
        yield best.bound_s
    for each, n_steps in _steps(cluster):
        following = Relaxation(judge.timing(cluster.step.of(each, each)).cluster, hopeful=True)
        best = following.solve(Options((1,), streams=False, n_steps=n_steps))
        if best is not None:
            yield best.bound_s


# ---------------------------------------------------------------- what is asked


def _relaxed(judge: Judge, by_largest: bool) -> Iterator[Relaxed]:
    cluster = judge.cluster
    if cluster.problem.goal is Goal.TTFT and not cluster.problem.rounds:
        for chunk in _chunks(cluster):
            relaxation = Relaxation(judge.timing(cluster.step.of(chunk, 1)).cluster, by_largest=by_largest)
            yield from relaxation.prompts(_of_prompt(cluster, chunk))
        return
    relaxation = Relaxation(cluster, by_largest=by_largest)
    found = [best for options in _options(cluster) if (best := relaxation.solve(options)) is not None]
    yield from found
    if found and not cluster.problem.rounds and not by_largest:
        best = min(found, key=lambda one: one.time_s)
        for without in _least_used(cluster, best):
            if (left := relaxation.solve(Options(without=without))) is not None:
                yield left
    for each, n_steps in _steps(cluster):
        following = Relaxation(judge.timing(cluster.step.of(each, each)).cluster, by_largest=by_largest)
        if (piped := following.solve(Options((1,), streams=False, n_steps=n_steps))) is not None:
            yield piped


def _options(cluster: Cluster) -> Iterator[Options]:
    rounds = cluster.problem.rounds
    shares = sorted({(1.0,) * len(cluster.members), _disk_shares(cluster)}, reverse=True)
    for disk_share in shares:
        if rounds:
            yield Options((rounds,), disk_share)
            continue
        yield Options(VISITS, disk_share)
        for n in _SPREADS:
            yield Options((n,) if n == 1 else (1, n), disk_share)
    if not rounds:
        yield Options((1,), streams=False)


def _disk_shares(cluster: Cluster) -> tuple[float, ...]:
    """As if all nodes of a disk read all the time."""
    disks = [member.disk or f"\0{member.index}" for member in cluster.members]
    return tuple(1 / disks.count(disk) for disk in disks)


def _least_used(cluster: Cluster, best: Relaxed) -> list[frozenset[int]]:
    others = sorted((share for share in best.shares if share.member != cluster.head), key=lambda share: share.n_layers)
    return [frozenset({share.member}) for share in others[:_LEFT_OUT]]


def _steps(cluster: Cluster) -> list[tuple[int, int]]:
    """Sequences in a step, and the fewest steps in which all are served; for throughput, where all weights stay."""
    problem = cluster.problem
    if problem.goal is not Goal.THROUGHPUT or problem.rounds:
        return []
    fewest: dict[int, int] = {}
    for n_steps in range(2, min(problem.width, len(cluster.members) + 1) + 1):
        fewest.setdefault(-(-problem.width // n_steps), n_steps)
    return list(fewest.items())


def _of_prompt(cluster: Cluster, chunk: int) -> Options:
    n_chunks, n_together = -(-cluster.problem.n_prompt // chunk), max(1, _gathered(cluster) // chunk)
    return Options((1,), n_chunks=n_chunks, reading=reading_of_further(n_chunks, n_together))


def _gathered(cluster: Cluster) -> int:
    problem = cluster.problem
    n_bytes = gather_bytes(problem, [node.name for node in problem.nodes])
    return gathered_tokens(n_bytes, problem.model.row_bytes)


def _chunks(cluster: Cluster) -> list[int]:
    """Of a prompt, that plans may have."""
    problem = cluster.problem
    usual = {
        usual_chunk(on_gpu, is_alone, n)
        for on_gpu in {not is_cpu(place.id) for place in cluster.places}
        for is_alone in (False, True)
        for n in (0, _gathered(cluster))
    }
    return sorted({min(problem.chunk or chunk, problem.n_prompt) for chunk in usual})


# ---------------------------------------------------------------- ways


def _ways(cluster: Cluster, shares: Sequence[Share], ring: Sequence[int], rounds: int) -> Iterator[Way]:
    most = max(share.n_visits for share in shares)
    yield laid_out(cluster, shares, ring)
    if not rounds and most > 1:
        yield laid_out(cluster, [_visited(share, most) for share in shares], ring)
        yield laid_out(cluster, [_visited(share, most if share.streams else 1) for share in shares], ring)


def _visited(share: Share, n_visits: int) -> Share:
    return replace(share, n_visits=min(n_visits, share.n_layers))


def _of_other_solvers(cluster: Cluster) -> Iterator[Way]:
    """In all the rounds that they would try; which is fastest need not be foretold for that."""
    problem = cluster.problem
    rates = {node.name: node.places[0].decode_bytes_s for node in problem.nodes}
    nodes = tuple(msgspec.structs.replace(node, disk_bytes_s=0.0) for node in problem.nodes)
    for shares in (None, rates):
        for rounds in (problem.rounds,) if problem.rounds else ROUNDS:
            asked = msgspec.structs.replace(problem, nodes=nodes, rounds=rounds)
            try:
                yield _way_of(cluster, proportional(asked, shares))
            except PlanError:
                break


def _way_of(cluster: Cluster, plan: Plan) -> Way:
    numbers = {(cluster.members[place.member].name, place.id): place.number for place in cluster.places}
    return tuple(
        numbers[visit.node, part.device]
        for visit in plan.visits
        for part in visit.parts(cluster.problem.node(visit.node).places[0].id)
        for _ in part.layers
    )
