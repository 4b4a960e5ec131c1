"""Formulas of passes with overlap, and the simulation of the same: one overloaded node in a ring of four."""

from __future__ import annotations

import random

import pytest

from prima_core.errors import PlanError
from prima_core.plan.costs import LayerCost, PassCost, VisitCost
from prima_core.plan.overlap import Reader, best_buffers, pass_s, reading_s
from prima_core.plan.simulate import Disk, simulate

GB = 10**9
HOP_S = 0.003
NODES = "abcd"
LAYERS = 32
"""Of each node."""


def reader(n_visits: int, over_bytes: int = 2 * GB, least_bytes: int = 0) -> Reader:
    return Reader(over_bytes, n_visits, compute_s=0.125, bytes_s=2 * GB, least_bytes=least_bytes)


def rest_s(n_visits: int) -> float:
    return 0.5 + 4 * n_visits * HOP_S


def ring(n_visits: int, read_bytes: float, hop_s: float = HOP_S, layers: int = LAYERS) -> PassCost:
    """Nodes a to d in turn, each so many times in a pass; `a` streams, evenly over its layers."""
    each = layers // n_visits
    compute_s, streamed = 0.125 / layers, read_bytes / layers
    return PassCost(
        tuple(
            VisitCost(node, hop_s, (LayerCost(compute_s, streamed if node == "a" else 0.0),) * each)
            for _ in range(n_visits)
            for node in NODES
        )
    )


@pytest.mark.parametrize(("n_visits", "expected_s"), [(1, 1.387), (2, 1.200), (4, 1.106), (8, 1.059)])
def test_rounds_hide_the_disk_as_the_formulas_say(n_visits: int, expected_s: float) -> None:
    """2 GB too many, 2 GB/s, 500 ms of computing in all and 125 of its own, hops of 3 ms."""
    buffers = best_buffers([reader(n_visits)], rest_s(n_visits))
    formula_s = pass_s([reader(n_visits)], buffers, rest_s(n_visits))
    assert formula_s == pytest.approx(expected_s, rel=0.002)
    others = [pass_s([reader(n_visits)], [size], rest_s(n_visits)) for size in range(0, GB, GB // 100)]
    assert formula_s <= min(others) + 1e-6, "no other buffer is better"


@pytest.mark.parametrize(("n_visits", "buffer_gb"), [(2, 0.40), (4, 0.21), (8, 0.12)])
def test_the_best_buffers_of_the_example(n_visits: int, buffer_gb: float) -> None:
    [size] = best_buffers([reader(n_visits)], rest_s(n_visits))
    assert size == pytest.approx(buffer_gb * GB, rel=0.03)


@pytest.mark.parametrize("n_visits", [1, 2, 4, 8])
def test_the_simulation_agrees_within_five_percent(n_visits: int) -> None:
    [size] = best_buffers([reader(n_visits, least_bytes=130_000_000)], rest_s(n_visits))
    formula_s = pass_s([reader(n_visits)], [size], rest_s(n_visits))
    simulated = simulate(ring(n_visits, 2 * GB + size), {"a": Disk(2 * GB, size)})
    assert formula_s * 0.999 <= simulated.pass_s <= 1.05 * formula_s
    assert simulated.read_bytes["a"] == pytest.approx(2 * GB + size), "every byte that is streamed, once in a pass"
    assert simulated.stall_s["a"] == pytest.approx(simulated.pass_s - rest_s(n_visits))


def test_no_pass_is_faster_than_its_disk_or_its_computing() -> None:
    assert pass_s([reader(8, over_bytes=0)], [0.0], rest_s(8)) == rest_s(8)
    assert pass_s([reader(99)], [2 * GB / 98], 0.0) == reading_s([reader(99)], [2 * GB / 98])
    without = simulate(ring(1, 0.0), {})
    assert without.pass_s == pytest.approx(rest_s(1))
    assert (without.stall_s, without.read_bytes) == ({}, {})


def test_a_buffer_beside_which_there_is_room_for_all_makes_nothing_be_read() -> None:
    beside = Reader(0, 1, compute_s=0.125, bytes_s=2 * GB, least_bytes=GB // 4, spare_bytes=GB)
    assert reading_s([beside], [GB]) == 0
    assert reading_s([beside], [1.5 * GB]) == pytest.approx(0.25)
    assert best_buffers([beside, reader(2)], rest_s(2))[1] == best_buffers([reader(2)], rest_s(2))[0]


def test_a_fast_disk_hides_all_at_over_bytes_by_gaps() -> None:
    fast = Reader(GB, 3, compute_s=0.1, bytes_s=100 * GB)
    [size] = best_buffers([fast], 1.0)
    assert size <= GB / 2
    assert pass_s([fast], [size], 1.0) == pytest.approx(1.0)
    slow_start = Reader(GB, 3, compute_s=0.0, bytes_s=2 * GB)
    assert best_buffers([slow_start], 10.0) == [GB // 2]


def test_readers_of_one_disk_share_it() -> None:
    apart = [Reader(GB, 2, 0.1, 2.0 * GB), Reader(GB, 2, 0.1, 2.0 * GB)]
    together = [Reader(GB, 2, 0.1, 2.0 * GB, disk="sda"), Reader(GB, 2, 0.1, 2.0 * GB, disk="sda")]
    sizes = [0.0, 0.0]
    assert reading_s(apart, sizes) == 0.5
    assert reading_s(together, sizes) == 1.0
    assert pass_s(apart, best_buffers(apart, 0.2), 0.2) < pass_s(together, best_buffers(together, 0.2), 0.2)


def both_stream(read_bytes: float, compute_s: float) -> PassCost:
    layers = (LayerCost(compute_s / 8, read_bytes / 8),) * 8
    return PassCost((VisitCost("a", 0.0, layers), VisitCost("b", 0.0, layers)))


def test_a_shared_disk_is_simulated_as_one() -> None:
    """Both read all the time: a second for 2 GB in all at 2 GB/s, each a half of it on a disk of its own."""
    cost = both_stream(GB, 0.01)
    own = simulate(cost, {name: Disk(2.0 * GB, GB // 2) for name in "ab"})
    shared = simulate(cost, {name: Disk(2.0 * GB, GB // 2, "sda") for name in "ab"})
    assert shared.pass_s == pytest.approx(1.0, rel=0.02)
    assert own.pass_s < 0.8 * shared.pass_s


def test_experts_are_read_on_demand_and_never_ahead() -> None:
    layers = (LayerCost(0.01, 0.0, GB / 10),) * 4
    cost = PassCost((VisitCost("a", 0.0, layers), VisitCost("b", 10.0, ())))
    simulated = simulate(cost, {"a": Disk(GB, GB)})
    assert simulated.stall_s["a"] == pytest.approx(0.4)
    assert simulated.read_bytes["a"] == pytest.approx(0.4 * GB)
    assert simulated.pass_s == pytest.approx(10.44)


def test_a_layer_larger_than_the_buffer_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(PlanError, match="more than the buffer"):
        simulate(ring(1, 3.2 * GB), {"a": Disk(GB, 99_000_000)})
    assert simulate(ring(1, 3.2 * GB), {"a": Disk(GB, 100_000_000)}).pass_s > 3.2


def test_more_memory_and_faster_disks_are_never_slower() -> None:
    """Of random nodes, with the best buffers: by the formulas always, simulated but for what layers are not even."""
    chance = random.Random(5)
    for _ in range(60):
        n_visits, over, rate = chance.choice((1, 2, 4, 8)), chance.randint(1, 4 * GB), chance.uniform(0.5, 4) * GB
        times = [formula_s(over * share, n_visits, rate * faster) for share, faster in ((1, 1), (0.7, 1), (1, 1.3))]
        assert times[1] <= times[0] + 1e-9
        assert times[2] <= times[0] + 1e-9


def formula_s(over_bytes: float, n_visits: int, rate: float) -> float:
    readers = [Reader(int(over_bytes), n_visits, 0.125, rate)]
    return pass_s(readers, best_buffers(readers, rest_s(n_visits)), rest_s(n_visits))


def test_in_the_simulation_a_faster_disk_and_a_larger_buffer_for_the_same_bytes_are_never_slower() -> None:
    chance = random.Random(6)
    for _ in range(25):
        n_visits, read, size = chance.choice((1, 2, 4)), chance.uniform(0.5, 4) * GB, chance.randint(GB // 8, GB)
        times = [
            simulate(ring(n_visits, read), {"a": Disk(rate, buffer_bytes)}).pass_s
            for rate, buffer_bytes in ((GB, size), (1.5 * GB, size), (GB, size + GB // 2))
        ]
        assert times[1] <= times[0] + 1e-6
        assert times[2] <= times[0] + 1e-6
