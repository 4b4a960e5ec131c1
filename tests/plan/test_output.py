"""Plans with the output part on another node than the head."""

from __future__ import annotations

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.costs import pass_cost
from prima_core.plan.plan import Plan, Visit, plan_from_json, plan_to_json
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem

MB = 10**6
MODEL = ModelFacts(
    "m", (100 * MB,) * 4, 60 * MB, 300 * MB, 0, 100, input_row_bytes=4096, activation_bytes=10_000,
    logits_bytes=500_000, largest_tensor_bytes=20 * MB,
)  # fmt: skip
PLAN = Plan(4, "a", (Visit("b", 0, 4),))


def problem_of(head_mb: int, model: ModelFacts = MODEL) -> Problem:
    def node(name: str, size_mb: int) -> NodeFacts:
        device = DeviceFacts("cpu", size_mb * MB, decode_bytes_s=10e9, prefill_bytes_s=100e9)
        return NodeFacts(name, size_mb * MB, (device,), 200e6)

    return Problem(model, (node("a", head_mb), node("b", 2000)), "a", 10, (LinkFacts(latency_s=0.001, bytes_s=1e8),))


def on(output: str) -> Plan:
    return msgspec.structs.replace(PLAN, output=output)


def weights(plan: Plan) -> dict[str, int]:
    return {need.node: need.weight_bytes // MB for need in plan.residency}


def test_each_end_is_counted_where_it_is() -> None:
    assert weights(complete(PLAN, problem_of(1000))) == {"a": 360, "b": 400}
    assert weights(complete(on("b"), problem_of(1000))) == {"a": 60, "b": 700}


def test_a_tied_matrix_is_counted_on_both_nodes() -> None:
    tied = msgspec.structs.replace(MODEL, input_row_bytes=0, input_bytes=300 * MB, output_bytes=0)
    assert weights(complete(PLAN, problem_of(1000, tied))) == {"a": 300, "b": 400}
    assert weights(complete(on("b"), problem_of(1000, tied))) == {"a": 300, "b": 700}


def test_a_head_without_the_output_part_reads_nothing_in_a_pass_though_its_table_has_no_room() -> None:
    tied = msgspec.structs.replace(MODEL, input_row_bytes=0, input_bytes=300 * MB, output_bytes=0)
    plan, problem = complete(on("b"), problem_of(40, tied)), problem_of(40, tied)
    head = next(need for need in plan.residency if need.node == "a")
    assert (head.streamed_bytes, head.buffer_bytes) == (300 * MB, 0)
    assert predict(plan, problem).nodes[0].read_bytes == 0


def test_a_head_that_has_to_read_the_matrix_is_slower_than_the_way_of_the_logits() -> None:
    problem = problem_of(150)
    here, there = (predict(complete(plan, problem), problem).token_s for plan in (PLAN, on("b")))
    assert there == pytest.approx(0.07 + 0.0011 + 0.001 + 500_000 / 1e8)
    assert here > 5 * there


def test_activations_of_wanted_rows_go_to_the_output_part_and_their_logits_to_the_head() -> None:
    plan, problem = complete(PLAN, problem_of(1000)), problem_of(1000)
    assert [visit.node for visit in pass_cost(plan, problem, 64, rows=2).visits] == ["b", "a"]
    plan = complete(msgspec.structs.replace(on("b"), visits=(Visit("a", 0, 4),)), problem)
    cost = pass_cost(plan, problem, 64, rows=2)
    assert [visit.node for visit in cost.visits] == ["a", "b", "a"]
    assert [visit.hop_s for visit in cost.visits] == pytest.approx([0, 0.001 + 2e4 / 1e8, 0.001 + 1e6 / 1e8])


def test_the_head_as_output_is_as_none() -> None:
    assert complete(on("a"), problem_of(1000)) == complete(PLAN, problem_of(1000))


def test_an_output_on_a_node_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="node 'c' is not in the cluster"):
        complete(on("c"), problem_of(1000))


def test_stops_are_the_way_of_a_step() -> None:
    assert PLAN.stops == ("b", "a")
    assert on("c").stops == ("b", "c", "a")
    assert on("c").nodes == ("a", "b", "c")
    assert [on("c").successors(name) for name in "abc"] == [("b",), ("c",), ("a",)]


def test_a_plan_with_an_output_comes_back_from_json() -> None:
    assert plan_from_json(plan_to_json(on("b"))) == on("b")
