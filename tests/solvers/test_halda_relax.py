"""The relaxation and the order of nodes, each against another way to the same answer."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from bench.solvers import large_problem, small_problem
from prima_halda.cluster import Cluster
from prima_halda.relax import Options, Relaxation
from prima_halda.ring import EXACT_UP_TO, ring_s, shortest_ring


def by_program(costs: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    """The least sum of costs, one number of layers for each node, all layers together: an integer program."""
    n_nodes, n_numbers = costs.shape
    one_each = np.kron(np.eye(n_nodes), np.ones(n_numbers))
    layers = np.tile(np.arange(n_numbers), n_nodes)
    rows = np.vstack([one_each, layers])
    right = np.array([1.0] * n_nodes + [n_numbers - 1])
    finite = np.where(np.isfinite(costs), costs, 1e6).ravel()
    found = milp(finite, constraints=LinearConstraint(rows, right, right), integrality=np.ones(costs.size))
    return float(found.fun)


@pytest.mark.parametrize("plenty", [0.6, 0.8, 1.2])
def test_dynamic_programming_and_an_integer_program_give_the_same(plenty: float) -> None:
    cluster = Cluster.of(large_problem(6, 24, plenty))
    relaxation, options = Relaxation(cluster), Options()
    found = relaxation.solve(options)
    assert found is not None
    for time_s in (0.95 * found.time_s, found.time_s, 1.5 * found.time_s):
        costs = relaxation.costs(options, time_s).min(axis=(1, 2))
        expected_s = by_program(costs) + relaxation.rest_s
        if expected_s < 1e5:
            own_s = relaxation.sum_s(options, time_s)
            assert own_s == pytest.approx(expected_s, rel=1e-6)
            assert (own_s <= time_s) is (time_s >= found.time_s * (1 - 1e-5))


def test_all_layers_are_shared_out() -> None:
    n_solved = 0
    for seed in range(60):
        cluster = Cluster.of(small_problem(seed))
        found = Relaxation(cluster).solve(Options())
        if found is not None:
            n_solved += 1
            assert sum(share.n_layers for share in found.shares) == cluster.n_layers
            assert all(1 <= share.n_visits <= share.n_layers for share in found.shares)
    assert n_solved > 30


def random_links(chance: random.Random, n: int) -> list[list[float]]:
    return [[0.0 if a == b else chance.uniform(1, 10) for b in range(n)] for a in range(n)]


def test_the_shortest_ring_of_few_nodes_is_the_best_of_all_orders() -> None:
    chance = random.Random(5)
    for n in (1, 2, 3, 5, 7):
        links = random_links(chance, n)
        ring = shortest_ring(links, 0, range(1, n))
        assert ring[0] == 0
        assert sorted(ring) == list(range(n))
        best = min(ring_s(links, (0, *order)) for order in itertools.permutations(range(1, n)))
        assert ring_s(links, ring) == pytest.approx(best)


def test_a_ring_of_many_nodes_cannot_be_made_shorter_by_turning_or_moving_a_part() -> None:
    links = random_links(random.Random(6), EXACT_UP_TO + 5)
    ring = shortest_ring(links, 3, [node for node in range(len(links)) if node != 3])
    assert sorted(ring) == list(range(len(links)))
    way = ring[1:]
    for i, j in itertools.combinations(range(len(way) + 1), 2):
        turned = (3, *way[:i], *way[i:j][::-1], *way[j:])
        assert ring_s(links, turned) >= ring_s(links, ring) * (1 - 1e-9)


def test_where_links_are_alike_the_order_is_as_given() -> None:
    assert shortest_ring([[0.0, 1.0, 1.0]] * 3, 1, [2, 0]) == (1, 2, 0)
