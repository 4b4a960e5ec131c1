"""Pictures show what is foretold, no more and no less."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan
from prima_core.plan.timeline import Lane, memory_parts, timeline
from tests.plan.home import ATTIC, DESK, LAPTOP, MB, TWO_VISITS, home, on_desk, told

HOME = home(DESK, LAPTOP, ATTIC)
PLAN = told(TWO_VISITS, HOME)
ALONE = told(Plan(8, "desk", (on_desk(0, 8, 2),)), HOME)


def taken_s(lane: Lane, kind: str) -> float:
    return sum(span.stop_s - span.start_s for span in lane.work if span.kind == kind)


@pytest.mark.parametrize("plan", [PLAN, ALONE], ids=["three nodes", "one node that streams"])
def test_what_nodes_do_takes_as_long_as_was_foretold(plan: Plan) -> None:
    line = timeline(plan, HOME)
    assert plan.forecast is not None
    assert line.pass_s == pytest.approx(plan.forecast.token_s)
    for lane, node in zip(line.lanes, plan.forecast.nodes, strict=True):
        assert lane.node == node.node
        times = [taken_s(lane, kind) for kind in ("compute", "stall", "link")]
        assert times == pytest.approx([node.compute_s, node.stall_s, node.link_s])


@pytest.mark.parametrize("plan", [PLAN, ALONE], ids=["three nodes", "one node that streams"])
def test_reading_takes_as_long_as_its_bytes_at_the_rate_of_the_disk(plan: Plan) -> None:
    assert plan.forecast is not None
    for lane, node in zip(timeline(plan, HOME).lanes, plan.forecast.nodes, strict=True):
        reading_s = sum(span.stop_s - span.start_s for span in lane.reading)
        assert reading_s == pytest.approx(node.read_bytes / HOME.node(lane.node).disk_bytes_s)


def test_one_node_works_at_a_time_and_somebody_always_does() -> None:
    line = timeline(PLAN, HOME)
    spans = sorted((span for lane in line.lanes for span in lane.work), key=lambda span: span.start_s)
    assert spans[0].start_s == 0
    assert spans[-1].stop_s == line.pass_s
    assert all(one.stop_s == pytest.approx(other.start_s) for one, other in pairwise(spans))


def test_what_goes_on_is_one_span() -> None:
    desk, laptop, attic = timeline(PLAN, HOME).lanes
    assert [span.kind for span in laptop.work] == ["link", "compute"] * 2
    assert [span.kind for span in attic.work] == ["link", "compute"]
    assert {span.kind for span in desk.reading} == {"read"}
    for lane in (desk, laptop, attic):
        assert all(one.kind != other.kind or one.stop_s < other.start_s for one, other in pairwise(lane.work))


def test_memory_is_told_by_what_lies_in_it() -> None:
    assert memory_parts(PLAN, "attic") == {"weights": 200 * MB, "buffer": 0, "KV": 1 * MB}
    desk = memory_parts(PLAN, "desk")
    assert desk["buffer"] > 0
    assert sum(desk.values()) <= DESK.room_bytes


def test_without_a_rate_there_is_no_picture() -> None:
    devices = tuple(msgspec.structs.replace(device, decode_bytes_s=0.0) for device in ATTIC.devices)
    unknown = msgspec.structs.replace(ATTIC, devices=devices)
    with pytest.raises(PlanError, match="of numpy:cpu on attic is not known"):
        timeline(PLAN, home(DESK, LAPTOP, unknown))


def test_of_a_model_without_bytes_there_is_no_picture() -> None:
    model = msgspec.structs.replace(HOME.model, layer_bytes=(0,) * 8, input_bytes=0, output_bytes=0, tensor_bytes=())
    problem = msgspec.structs.replace(HOME, model=model, links=())
    with pytest.raises(PlanError, match="no time at all"):
        timeline(told(Plan(8, "desk", (on_desk(0, 8, 2),)), problem), problem)
