from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.interfaces import KvType, Layers
from prima_core.plan.check import MAX_IN_FLIGHT, MAX_VISITS, complete
from prima_core.plan.plan import Plan, Split, Visit, plan_from_json, plan_to_json
from prima_core.plan.problem import DeviceFacts, ModelFacts, NodeFacts, Problem, problem_from_json, problem_to_json

PROBLEM = Problem(
    model=ModelFacts(
        name="four layers",
        layer_bytes=(100, 110, 120, 130),
        input_bytes=40,
        output_bytes=10,
        kv_bytes_per_token_layer=2,
        context_length=64,
    ),
    nodes=(
        NodeFacts("a", 1000, (DeviceFacts("numpy:cpu", 1000), DeviceFacts("torch:cuda:0", 1000, shares_host=False))),
        NodeFacts("b", 1000, (DeviceFacts("numpy:cpu", 1000),)),
    ),
    head="a",
    kv_tokens=5,
)
PLAN = Plan(n_layers=4, head="a", visits=(Visit("a", 0, 1), Visit("b", 1, 3), Visit("a", 3, 4)))


def with_visits(*visits: Visit) -> Plan:
    return msgspec.structs.replace(PLAN, visits=visits)


def test_a_right_plan_gets_its_kv_tokens_and_the_bytes_of_every_node() -> None:
    plan = complete(PLAN, PROBLEM)
    need = {residency.node: (residency.weight_bytes, residency.kv_bytes) for residency in plan.residency}
    assert plan.kv_tokens == 5
    assert need == {"a": (40 + 10 + 100 + 130, 2 * 2 * 5), "b": (110 + 120, 2 * 2 * 5)}
    assert plan.visits == PLAN.visits


def test_all_that_nodes_must_agree_on_comes_from_the_problem() -> None:
    model = msgspec.structs.replace(PROBLEM.model, kv_type=KvType.Q8_0)
    problem = msgspec.structs.replace(PROBLEM, model=model)
    for stated in (PLAN, msgspec.structs.replace(PLAN, kv_type=KvType.F32, context=9)):
        plan = complete(stated, problem)
        assert (plan.kv_type, plan.context) == (KvType.Q8_0, 64)


def test_a_plan_may_ask_for_more_kv_than_the_problem() -> None:
    plan = complete(msgspec.structs.replace(PLAN, kv_tokens=50), PROBLEM)
    assert [residency.kv_bytes for residency in plan.residency] == [200, 200]


def test_a_node_may_be_visited_again_and_the_head_not_at_all() -> None:
    complete(with_visits(Visit("b", 0, 1), Visit("b", 1, 2), Visit("b", 2, 4)), PROBLEM)


def test_a_completed_plan_stays_as_it_is() -> None:
    plan = complete(PLAN, PROBLEM)
    assert complete(plan, PROBLEM) == plan


def test_what_a_plan_says_about_residency_is_not_believed() -> None:
    plan = complete(PLAN, PROBLEM)
    boast = tuple(msgspec.structs.replace(residency, weight_bytes=0) for residency in plan.residency)
    assert complete(msgspec.structs.replace(plan, residency=boast), PROBLEM) == plan


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (msgspec.structs.replace(PLAN, n_layers=5), "for 5 layers, the model has 4"),
        (msgspec.structs.replace(PLAN, head="b"), "head is 'b', the cluster's is 'a'"),
        (with_visits(), "has 0 visits"),
        (with_visits(Visit("a", 1, 4)), "expected a range that starts at 0"),
        (with_visits(Visit("a", 0, 2), Visit("b", 1, 4)), "visit 1 covers layers .1, 4., expected .* starts at 2"),
        (with_visits(Visit("a", 0, 2), Visit("b", 3, 4)), "visit 1 covers layers .3, 4., expected .* starts at 2"),
        (with_visits(Visit("a", 0, 2), Visit("b", 2, 2), Visit("a", 2, 4)), "visit 1"),
        (with_visits(Visit("a", 0, 5)), "visit 0"),
        (with_visits(Visit("a", 0, 3)), "end at layer 3, the model has 4"),
        (with_visits(Visit("c", 0, 4)), "node 'c' is not in the cluster"),
        (msgspec.structs.replace(PLAN, in_flight=-1), "in_flight is -1"),
        (msgspec.structs.replace(PLAN, in_flight=MAX_IN_FLIGHT + 1), "in_flight"),
        (msgspec.structs.replace(PLAN, kv_tokens=-1), "kv_tokens is -1"),
    ],
)
def test_a_broken_rule_is_named(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        complete(plan, PROBLEM)


def test_too_many_visits_are_refused_before_they_are_walked() -> None:
    with pytest.raises(PlanError, match=f"has {MAX_VISITS + 1} visits"):
        complete(with_visits(*[Visit("a", 0, 1)] * (MAX_VISITS + 1)), PROBLEM)


def test_a_split_covers_its_visit_over_devices_of_the_node() -> None:
    complete(with_visits(Visit("a", 0, 4, (Split("torch:cuda:0", 0, 3), Split("numpy:cpu", 3, 4)))), PROBLEM)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ((Split("mlx:gpu", 0, 4),), "no device 'mlx:gpu'.*numpy:cpu, torch:cuda:0"),
        (
            (Split("numpy:cpu", 0, 2), Split("torch:cuda:0", 3, 4)),
            r"torch:cuda:0 the layers \[3, 4\), .*starts at 2 .*without gaps",
        ),
        ((Split("numpy:cpu", 0, 3), Split("torch:cuda:0", 2, 4)), r"the layers \[2, 4\), .*starts at 3"),
        ((Split("numpy:cpu", 0, 2),), "ends at layer 2 .*without gaps"),
        ((Split("numpy:cpu", 0, 5),), r"the layers \[0, 5\), expected .*\[0, 4\)"),
    ],
)
def test_a_broken_split_is_named(split: tuple[Split, ...], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        complete(with_visits(Visit("a", 0, 4, split)), PROBLEM)


def test_memory_counts_weights_kv_and_the_input_and_output_part_to_the_byte() -> None:
    need = 460 + 50 + 4 * 2 * 5
    alone = with_visits(Visit("a", 0, 4))
    for memory_bytes, fits in ((need, True), (need - 1, False)):
        problem = msgspec.structs.replace(PROBLEM, nodes=(NodeFacts("a", memory_bytes),))
        if fits:
            complete(alone, problem)
        else:
            with pytest.raises(PlanError, match="node 'a' would need"):
                complete(alone, problem)


GPU = DeviceFacts("gpu", 280, shares_host=False)
CPU = DeviceFacts("cpu", 300)
SPLIT = with_visits(Visit("a", 0, 4, (Split("gpu", 0, 2), Split("cpu", 2, 4))))
"""On the gpu 50 of the ends, 210 of layers and 20 of KV; on the cpu 250 and 20."""


def of_devices(*devices: DeviceFacts, host: int) -> Problem:
    return msgspec.structs.replace(PROBLEM, nodes=(NodeFacts("a", host, devices),))


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (of_devices(GPU, CPU, host=270), ""),
        (of_devices(DeviceFacts("gpu", 279, shares_host=False), CPU, host=270), r"on gpu \(.* use 0\.00 GB"),
        (of_devices(GPU, DeviceFacts("cpu", 269), host=270), "on cpu"),
        (of_devices(GPU, CPU, host=269), r"'a' would need 0\.00 GB \("),
        (of_devices(DeviceFacts("gpu", 300), CPU, host=550), ""),
        (of_devices(DeviceFacts("gpu", 300), CPU, host=549), r"'a' would need 0\.00 GB \("),
    ],
)
def test_every_device_holds_its_part_and_those_that_share_the_hosts_memory_fit_it_together(
    problem: Problem, says: str
) -> None:
    if not says:
        needs = [(need.device, need.weight_bytes, need.kv_bytes) for need in complete(SPLIT, problem).residency]
        assert needs == [("gpu", 260, 20), ("cpu", 250, 20)]
    else:
        with pytest.raises(PlanError, match=says):
            complete(SPLIT, problem)


def test_types_that_grow_on_a_device_count_as_large_as_they_are_there() -> None:
    """On the gpu Q takes half as much again: 5 of layer 0, none of layer 1, 20 of the input part."""
    types = {"Q": (10, 0, 30, 40), "F32": (90, 110, 90, 90)}
    model = msgspec.structs.replace(PROBLEM.model, layer_types=types, input_types={"Q": 40}, output_types={"F32": 10})
    gpu = DeviceFacts("gpu", 305, shares_host=False, growth={"Q": 1.5})
    problem = msgspec.structs.replace(of_devices(gpu, CPU, host=270), model=model)
    assert [need.weight_bytes for need in complete(SPLIT, problem).residency] == [285, 250]
    assert problem_from_json(problem_to_json(problem)) == problem
    smaller = msgspec.structs.replace(gpu, memory_bytes=304)
    with pytest.raises(PlanError, match="on gpu"):
        complete(SPLIT, msgspec.structs.replace(of_devices(smaller, CPU, host=270), model=model))


def test_the_ends_lie_where_there_is_room_for_them_and_the_plan_says_so() -> None:
    small = msgspec.structs.replace(GPU, memory_bytes=49)
    on_cpu = with_visits(Visit("a", 0, 4, (Split("cpu", 0, 4),)))
    problem = of_devices(small, msgspec.structs.replace(CPU, memory_bytes=1000), host=550)
    assert complete(on_cpu, problem).end_device == "cpu"
    assert [(need.device, need.weight_bytes) for need in complete(on_cpu, problem).residency] == [("cpu", 510)]
    assert complete(SPLIT, of_devices(GPU, CPU, host=270)).end_device == "gpu"


def test_sizes_by_type_are_one_for_each_layer() -> None:
    text = problem_to_json(PROBLEM).replace(b'"layer_types": {}', b'"layer_types": {"Q": [1, 2]}')
    with pytest.raises(PlanError, match="2 sizes for Q, the model 4 layers"):
        problem_from_json(text)


def test_a_head_that_computes_no_layer_still_holds_the_input_and_output_part() -> None:
    nodes = (NodeFacts("a", 49), NodeFacts("b", 1000))
    with pytest.raises(PlanError, match="node 'a'"):
        complete(with_visits(Visit("b", 0, 4)), msgspec.structs.replace(PROBLEM, nodes=nodes))


def test_plans_and_problems_survive_json() -> None:
    plan = msgspec.structs.replace(complete(PLAN, PROBLEM), kv_type=KvType.Q8_0)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert problem_from_json(problem_to_json(PROBLEM)) == PROBLEM


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a plan"),
        ('{"n_layers": 4, "head": "a", "visits": [], "colour": 1}', "colour"),
        ('{"n_layers": "4", "head": "a", "visits": []}', "n_layers"),
        ('{"head": "a", "visits": []}', "n_layers"),
        ('{"n_layers": 4, "head": "a", "visits": [], "kv_type": "q3"}', "kv_type"),
        ('{"n_layers": 4, "head": "a", "visits": [], "context": -1}', "context"),
        ('{"n_layers": 4, "head": "a", "visits": [{"node": "a", "start": 0}]}', "stop"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_the_field(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan_from_json(text.encode())


def test_a_plan_file_need_not_state_what_is_filled_in() -> None:
    visits = b'[{"node": "a", "start": 0, "stop": 4}]'
    assert plan_from_json(b'{"n_layers": 4, "head": "a", "visits": %s}' % visits) == with_visits(Visit("a", 0, 4))


def test_a_file_that_is_no_problem_is_refused_with_the_field() -> None:
    with pytest.raises(PlanError, match="model"):
        problem_from_json(b'{"nodes": [], "head": "a", "kv_tokens": 1}')


def test_the_ring_of_a_plan_starts_and_ends_at_the_head() -> None:
    plan = with_visits(Visit("b", 0, 1), Visit("a", 1, 2), Visit("c", 2, 3), Visit("b", 3, 4))
    assert plan.nodes == ("a", "b", "c")
    assert plan.layers_of("b") == (Layers(0, 1), Layers(3, 4))
    assert [plan.successors(node) for node in plan.nodes] == [("b", "c"), ("a",), ("b",)]
    assert plan.credit == 5
    assert msgspec.structs.replace(plan, in_flight=2).credit == 2


@pytest.mark.parametrize("read", [plan_from_json, problem_from_json])
def test_what_is_no_text_is_no_plan_and_no_problem(read: Callable[[bytes], object]) -> None:
    with pytest.raises(PlanError, match="not a p"):
        read(b'{"head": "\xff\xfe"}')


def test_a_plan_of_absurdly_many_positions_is_refused() -> None:
    plan = plan_from_json(plan_to_json(PLAN).replace(b'"kv_tokens": 0', b'"kv_tokens": 1' + b"0" * 400))
    with pytest.raises(PlanError, match="kv_tokens"):
        complete(plan, PROBLEM)
