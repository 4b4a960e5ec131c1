"""The relaxation and the order of nodes, each against another way to the same answer."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from bench.solvers import large_problem, small_problem
from prima_halda.filling import Floats
from prima_halda.judge import Judges
from prima_halda.relax import Options, Relaxation
from prima_halda.ring import EXACT_UP_TO, ending_at, ring_s, shortest_ring

Costs = list[tuple[Floats | None, Floats | None]]


def by_program(nodes: Costs, n_layers: int) -> float:
    """The least sum of costs, one number of layers for each node, all layers together, and one node that has the output
    part: an integer program."""
    choices = [
        (index, number, has_output, cost)
        for index, costs in enumerate(nodes)
        for has_output, of_number in enumerate(costs)
        if of_number is not None
        for number, cost in enumerate(of_number)
        if np.isfinite(cost)
    ]
    rows = np.array(
        [
            *([float(index == own) for index, *_ in choices] for own in range(len(nodes))),
            [float(number) for _, number, *_ in choices],
            [float(has_output) for _, _, has_output, _ in choices],
        ]
    )
    right = np.array([1.0] * len(nodes) + [float(n_layers), 1.0])
    found = milp(
        np.array([cost for *_, cost in choices]),
        constraints=LinearConstraint(rows, right, right),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
    )
    return float(found.fun) if found.success else np.inf


@pytest.mark.parametrize("plenty", [0.6, 0.8, 1.2])
def test_dynamic_programming_and_an_integer_program_give_the_same(plenty: float) -> None:
    judges, n_elsewhere = Judges.of(large_problem(6, 24, plenty)), 0
    relaxation = Relaxation.of([judges[output].cluster for output in judges.outputs])
    for options in (Options(), Options(output=3), Options((1, 4), without=frozenset({0, 2}))):
        found = relaxation.solve(options)
        assert found is not None
        n_elsewhere += found.output != 0
        for time_s in (0.95 * found.time_s, found.time_s, 1.5 * found.time_s):
            expected_s = by_program(relaxation.of_nodes(options, time_s), 24)
            own_s = relaxation.sum_s(options, time_s)
            assert own_s == pytest.approx(expected_s, rel=1e-6)
            assert (own_s <= time_s) is (time_s >= found.time_s * (1 - 1e-5))
    assert n_elsewhere


@pytest.mark.parametrize("plenty", [0.6, 1.2])
def test_asked_for_all_outputs_at_once_it_says_what_it_says_for_each_alone(plenty: float) -> None:
    judges = Judges.of(large_problem(5, 24, plenty))
    together = Relaxation.of([judges[output].cluster for output in judges.outputs], hopeful=True)
    alone = {
        output: Relaxation.of([judges[output].cluster], hopeful=True).solve(Options()) for output in judges.outputs
    }
    times = {output: found.time_s for output, found in alone.items() if found is not None}
    best = together.solve(Options())
    assert best is not None
    assert best.time_s == pytest.approx(min(times.values()), rel=1e-4)
    assert times[best.output] == min(times.values())
    for output, time_s in times.items():
        forced = together.solve(Options(output=output))
        assert forced is not None
        assert forced.time_s == pytest.approx(time_s, rel=1e-4)
        assert together.by_output(Options(), 1.5 * time_s)[output] == pytest.approx(
            together.sum_s(Options(output=output), 1.5 * time_s)
        )


def test_all_layers_are_shared_out() -> None:
    n_solved = 0
    for seed in range(60):
        judges = Judges.of(small_problem(seed))
        found = Relaxation.of([judges[output].cluster for output in judges.outputs]).solve(Options())
        if found is not None:
            n_solved += 1
            assert found.output in judges.outputs
            assert sum(share.n_layers for share in found.shares) == judges.base.cluster.n_layers
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
    assert shortest_ring([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], 1, [2, 0]) == (1, 2, 0)


def test_a_ring_may_be_asked_to_end_at_a_node_and_is_then_the_shortest_of_those() -> None:
    chance = random.Random(8)
    for n in (2, 4, 6):
        links = random_links(chance, n)
        for last in range(1, n):
            ring = shortest_ring(ending_at(links, 0, last), 0, range(1, n))
            assert ring[-1] == last
            orders = [order for order in itertools.permutations(range(1, n)) if order[-1] == last]
            best = min(ring_s(links, (0, *order)) for order in orders)
            assert ring_s(links, ring) == pytest.approx(best)
