"""What is told of a cluster and its requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prima_core.events import RequestDone
from prima_core.interfaces import Layers
from prima_core.node.driver import State, Status
from prima_core.node.member import Member
from prima_core.node.view import BOUNDS_S, DeviceView, Histogram, LinkView, RequestTotals, link_views, node_view
from prima_core.plan.plan import Plan, Residency, Split, Visit
from prima_core.plan.problem import DeviceFacts, LinkFacts
from prima_core.ring.times import NodeTimes

A, B = (Member(name, 1000, (DeviceFacts("numpy:cpu", 2000),), f"inproc://{name}") for name in "ab")
VISITS = (Visit("a", 0, 1), Visit("b", 1, 2), Visit("a", 2, 4))
PLAN = Plan(4, "a", VISITS, (Residency("a", "numpy:cpu", 300, 20), Residency("b", "numpy:cpu", 100, 10)))
TIMES = NodeTimes(compute_s=1.0)


def test_a_node_is_told_with_its_part_of_the_plan() -> None:
    status = Status(State.LOADING, plan=PLAN, members=(A, B), progress={"b": 0.25})
    head, worker = (node_view(member, "a", status, TIMES) for member in (A, B))
    assert (head.is_head, worker.is_head) == (True, False)
    assert (head.layers, worker.layers) == ((Layers(0, 1), Layers(2, 4)), (Layers(1, 2),))
    assert (head.weight_bytes, head.kv_bytes, head.memory_bytes) == (300, 20, 1000)
    assert (head.loaded, worker.loaded) == (None, 0.25)
    assert worker.times is TIMES


def test_a_node_with_several_devices_is_told_with_the_part_of_each() -> None:
    gpu, cpu = DeviceFacts("torch:cuda:0", 500, shares_host=False), DeviceFacts("numpy:cpu", 2000)
    split = Split("torch:cuda:0", 0, 2), Split("numpy:cpu", 2, 3)
    plan = Plan(
        4,
        "a",
        (Visit("a", 0, 3, split), Visit("b", 3, 4)),
        (Residency("a", "torch:cuda:0", 400, 30), Residency("a", "numpy:cpu", 100, 10), Residency("b", "x", 7, 7)),
    )
    view = node_view(Member("a", 1000, (gpu, cpu), ""), "a", Status(State.SERVING, plan=plan), TIMES)
    assert view.devices == (
        DeviceView("torch:cuda:0", 500, 400, 30, (Layers(0, 2),)),
        DeviceView("numpy:cpu", 2000, 100, 10, (Layers(2, 3),)),
    )
    assert (view.memory_bytes, view.weight_bytes, view.kv_bytes) == (1500, 500, 40)


def test_what_comes_from_disk_is_told_of_each_device() -> None:
    plan = Plan(4, "a", VISITS, (Residency("a", "numpy:cpu", 300, 20, 120, 40), Residency("b", "numpy:cpu", 100, 10)))
    a, b = (node_view(member, "a", Status(State.SERVING, plan=plan), TIMES) for member in (A, B))
    assert (a.devices[0].weight_bytes, a.devices[0].streamed_bytes) == (300, 120)
    assert b.devices[0].streamed_bytes == 0


def test_measured_links_are_told_and_assumed_ones_are_not() -> None:
    links = (LinkFacts("b", "a", 0.002, 1e8), LinkFacts("a", "b", 0.001, 2e8))
    told = link_views((A, replace(B, links=links)))
    assert told == (LinkView("a", "b", 0.001, 2e8), LinkView("b", "a", 0.002, 1e8))
    assert link_views((A, B)) == ()


def test_a_node_without_a_plan_has_no_part() -> None:
    view = node_view(B, "a", Status(State.WAITING), TIMES)
    assert (view.layers, view.weight_bytes, view.kv_bytes, view.loaded) == ((), 0, 0, None)


def test_a_value_on_a_bound_lies_below_it() -> None:
    histogram = Histogram()
    for value in (0.0, BOUNDS_S[0], BOUNDS_S[1], 1e9):
        histogram = histogram.plus(value)
    assert histogram.counts == (2, 1, *(0,) * (len(BOUNDS_S) - 2), 1)
    assert histogram.total == pytest.approx(1e9)


def test_totals_of_requests() -> None:
    totals = RequestTotals()
    for done in (
        RequestDone("1", 10, 5, "stop", first_token_s=0.3, total_s=0.7, n_cached_tokens=4),
        RequestDone("2", 20, 1, "length", first_token_s=0.3, total_s=0.3),
        RequestDone("3", 30, 0, "error", first_token_s=9.0, total_s=9.0),
        RequestDone("4", 1, 3, "stop", first_token_s=0.1, total_s=0.3),
    ):
        totals = totals.plus(done)
    assert totals.outcomes == {"stop": 2, "length": 1, "error": 1}
    assert (totals.prompt_tokens, totals.cached_tokens, totals.generated_tokens) == (61, 4, 9)
    assert sum(totals.ttft_s.counts) == 3, "what failed before its first token had none"
    assert totals.ttft_s.total == pytest.approx(0.7)
    assert sum(totals.tpot_s.counts) == 2, "a single token has no time per further token"
    assert totals.tpot_s.total == pytest.approx(0.1 + 0.1)
