"""Where the search begins: what the relaxation says, laid out in several manners, and what other solvers would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from prima_halda.judge import Judges
from prima_halda.layout import laid_out
from prima_halda.memory import Way
from prima_halda.relax import VISITS, Options, Relaxation, Relaxed, Share
from prima_halda.ring import ending_at, shortest_ring

_SPREADS = (1, 2, 4, 8, 16)
_ORDERS = 2
_LEFT_OUT = 3
"""Nodes with the fewest layers that are each left out once."""
_OUTPUTS = 2
_NEAR = 1.03
"""So many nodes, besides the head, are asked about further if with the output part there the relaxation takes hardly
longer than with the best."""

Start = tuple[int, Way]
"""The node with the output part, and where the layers lie."""
Rings = Callable[[tuple[int, ...], int], tuple[int, ...]]

_ALL_VISITS = tuple(range(1, 33))


def starts(judges: Judges) -> list[Start]:
    """Of the relaxation, with layers as large as the usual one, and where they differ as the largest; and of others."""
    cluster, found = judges.base.cluster, list[Start]()
    rings = cache(lambda others, last: _ring(cluster, others, last))
    for by_largest in (False, True):
        for relaxed in _relaxed(judges, by_largest):
            found += ((relaxed.output, way) for way in _ways(judges[relaxed.output].cluster, relaxed, rings))
        if not differs(cluster):
            break
    if not cluster.problem.rounds:
        found += list(_in_one_round(judges, found))
    outputs = dict.fromkeys((judges.outputs[0], *(output for output, _ in found)))
    found += ((output, way) for output in outputs for way in _of_other_solvers(judges[output].cluster))
    return list(dict.fromkeys(found))


def _ring(cluster: Cluster, others: tuple[int, ...], last: int) -> tuple[int, ...]:
    """The shortest, that ends there if the node is one of these."""
    hop_s = ending_at(cluster.hop_s, cluster.head, last) if last in others else cluster.hop_s
    return shortest_ring(hop_s, cluster.head, others)


def _in_one_round(judges: Judges, found: Sequence[Start]) -> Iterator[Start]:
    """Nodes in the order in which the others visit them first, and all that they leave out, both ways round."""
    places = judges.base.cluster.places
    visited = ((output, tuple(dict.fromkeys(places[number].member for number in way))) for output, way in found)
    of_output: dict[int, list[tuple[int, ...]]] = {}
    for output, order in dict.fromkeys(visited):
        of_output.setdefault(output, []).append(order)
    for output, orders in of_output.items():
        cluster, asked = judges[output].cluster, list[tuple[int, ...]]()
        for order in orders[:_ORDERS]:
            rest = [member.index for member in cluster.members if member.index not in order]
            asked += [(*order, *rest), (*rest, *reversed(order))]
        yield from ((output, way) for way in contiguous(cluster, asked))


def bound_s(judges: Judges) -> float:
    """No plan is faster, as far as layers are alike, wherever it has the output part. One on the head alone, on
    whichever of its devices, needs no link: the relaxation counts one that leads back."""
    problem = judges.base.cluster.problem
    bounds = list(_hopeful_bounds(judges))
    if not problem.output:
        alone = msgspec.structs.replace(problem, nodes=(problem.node(problem.head),), links=())
        bounds += _hopeful_bounds(Judges.of(alone))
    return min(bounds, default=0.0)


def differs(cluster: Cluster) -> bool:
    return len(set(cluster.problem.model.layer_bytes)) > 1


def _hopeful_bounds(judges: Judges) -> Iterator[float]:
    """For a prompt, nodes that read are visited once, or chunks go round one at a time."""
    cluster = judges.base.cluster
    if cluster.problem.goal is Goal.TTFT:
        for chunk, clusters in _of_prompts(judges):
            hopeful = Relaxation.of(clusters, hopeful=True)
            asked = _of_prompt(cluster, chunk)
            yield from (one.bound_s for one in hopeful.prompts(asked))
            if (best := hopeful.solve(Options(_ALL_VISITS))) is not None:
                yield best.bound_s * asked.n_chunks
        return
    best = Relaxation.of(judges.clusters(cluster.step), hopeful=True).solve(Options(_ALL_VISITS))
    if best is not None:
        yield best.bound_s
    for each, n_steps in _steps(cluster):
        following = Relaxation.of(judges.clusters(cluster.step.of(each, each)), hopeful=True)
        best = following.solve(Options((1,), streams=False, n_steps=n_steps))
        if best is not None:
            yield best.bound_s


# ---------------------------------------------------------------- what is asked


def _relaxed(judges: Judges, by_largest: bool) -> Iterator[Relaxed]:
    cluster = judges.base.cluster
    if cluster.problem.goal is Goal.TTFT and not cluster.problem.rounds:
        for chunk, clusters in _of_prompts(judges):
            relaxation = Relaxation.of(clusters, by_largest=by_largest)
            yield from relaxation.prompts(_of_prompt(cluster, chunk))
        return
    relaxation = Relaxation.of(judges.clusters(cluster.step), by_largest=by_largest)
    found = list(_of_outputs(relaxation, judges, Options(_visits(cluster))))
    yield from found
    relaxation = relaxation.with_outputs([one.output for one in found] or judges.outputs[:1])
    found += [best for options in _options(cluster, by_largest) if (best := relaxation.solve(options)) is not None]
    yield from found
    if found and not by_largest:
        best = min(found, key=lambda one: one.time_s)
        for without in _least_used(cluster, best):
            if (left := relaxation.solve(Options(_visits(cluster), without=without))) is not None:
                yield left
    for each, n_steps in _steps(cluster):
        following = Relaxation.of(judges.clusters(cluster.step.of(each, each)), by_largest=by_largest)
        if (piped := following.solve(Options((1,), streams=False, n_steps=n_steps))) is not None:
            yield piped


def _of_outputs(relaxation: Relaxation, judges: Judges, options: Options) -> Iterator[Relaxed]:
    """With the output part where it is best, on the head, and on some other nodes if that is hardly slower."""
    best = relaxation.solve(options)
    if best is None:
        return
    yield best
    sums = relaxation.by_output(options, best.time_s)
    near = sorted((output for output in sums if sums[output] <= _NEAR * best.time_s), key=lambda output: sums[output])
    for output in dict.fromkeys((judges.outputs[0], *near[:_OUTPUTS])):
        if output != best.output and (found := relaxation.solve(replace(options, output=output))) is not None:
            yield found


def _visits(cluster: Cluster) -> tuple[int, ...]:
    return (cluster.problem.rounds,) if cluster.problem.rounds else VISITS


def _options(cluster: Cluster, by_largest: bool) -> Iterator[Options]:
    """Besides any visits with disks of nodes' own."""
    rounds = cluster.problem.rounds
    own = (1.0,) * len(cluster.members)
    for disk_share in sorted({own, _disk_shares(cluster)}, reverse=True):
        if disk_share != own:
            yield Options(_visits(cluster), disk_share)
        for n in () if rounds or by_largest else _SPREADS:
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


def _of_prompts(judges: Judges) -> Iterator[tuple[int, list[Cluster]]]:
    """Chunks that plans may have, with what they may use then: with a GPU they are longer."""
    cluster = judges.base.cluster
    problem, gathered = cluster.problem, (0, _gathered(cluster))
    for on_gpu in sorted({not is_cpu(place.id) for place in cluster.places}):
        usual = {usual_chunk(on_gpu, is_alone, n) for is_alone in (False, True) for n in gathered}
        for chunk in sorted({min(problem.chunk or chunk, problem.n_prompt) for chunk in usual}):
            clusters = judges.clusters(cluster.step.of(chunk, 1))
            if not on_gpu:
                clusters = [without for one in clusters if (without := one.on_cpus()) is not None]
            if clusters:
                yield chunk, clusters


# ---------------------------------------------------------------- ways


def _ways(cluster: Cluster, relaxed: Relaxed, rings: Rings) -> Iterator[Way]:
    """Who has the output part comes last, where that saves a link in the only round."""
    shares = relaxed.shares
    most = max(share.n_visits for share in shares)
    others = tuple(share.member for share in shares if share.member != cluster.head)
    ring = rings(others, relaxed.output if most == 1 else cluster.head)
    yield laid_out(cluster, shares, ring)
    if not cluster.problem.rounds and most > 1:
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
