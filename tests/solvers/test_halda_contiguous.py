"""The best cuts of one round, against all cuts."""

from __future__ import annotations

import itertools
import random

import msgspec

from bench.solvers import small_problem
from prima_halda.cluster import Cluster
from prima_halda.contiguous import contiguous
from prima_halda.judge import Judge
from prima_halda.memory import Way


def in_order(cluster: Cluster, way: Way, order: list[int]) -> bool:
    """Every place once, nodes in this order."""
    runs = [number for number, _ in itertools.groupby(way)]
    turns = [index for index, _ in itertools.groupby(cluster.places[number].member for number in runs)]
    return len(set(runs)) == len(runs) and turns == [index for index in order if index in turns]


def test_no_way_in_that_order_that_keeps_all_is_faster() -> None:
    n_found = 0
    for seed in range(120):
        problem = msgspec.structs.replace(small_problem(seed), streaming=False)
        links = problem.links[:1] if len(problem.links) == 1 else ()
        problem = msgspec.structs.replace(problem, links=links)
        cluster = Cluster.of(problem)
        if len(cluster.places) ** cluster.n_layers > 3000:
            continue
        order = [member.index for member in cluster.members]
        order = [cluster.head, *random.Random(seed).sample([i for i in order if i != cluster.head], len(order) - 1)]
        judge, way = Judge(cluster), next(contiguous(cluster, [order]), None)
        ways = itertools.product(range(len(cluster.places)), repeat=cluster.n_layers)
        trials = [trial for one in ways if in_order(cluster, one, order) and (trial := judge.trial(one)) is not None]
        if not trials:
            assert way is None or judge.trial(way) is None
            continue
        assert way is not None, seed
        own = judge.trial(way)
        assert own is not None, seed
        best_s, hop_s = min(trial.time_s for trial in trials), max(map(max, cluster.hop_s))
        assert own.time_s <= best_s + hop_s + 1e-9, seed
        assert own.time_s >= best_s - 1e-9
        n_found += 1
    assert n_found > 20


def test_layers_of_other_sizes_move_the_cuts() -> None:
    problem = small_problem(2)
    model = msgspec.structs.replace(problem.model, layer_bytes=(10**8, 10**9, 10**8))
    [first, second, *_] = problem.nodes
    nodes = tuple(
        msgspec.structs.replace(
            node, memory_bytes=size, devices=(msgspec.structs.replace(node.devices[-1], memory_bytes=size),)
        )
        for node, size in ((first, 3 * 10**8 + model.input_bytes + model.output_bytes), (second, 12 * 10**8))
    )
    cluster = Cluster.of(msgspec.structs.replace(problem, model=model, nodes=nodes, streaming=False, links=()))
    assert list(contiguous(cluster, [[0, 1]])) == [(0, 1, 1)]
