"""How long a device computes, from the rates that were measured of it."""

from __future__ import annotations

import msgspec
import pytest

from prima_core.plan.check import complete
from prima_core.plan.costs import compute_s, demand_bytes_s, pass_cost, touched_types
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.predict import predict
from prima_core.plan.problem import (
    OUTPUT,
    RANDOM_BYTES,
    DeviceFacts,
    ModelFacts,
    NodeFacts,
    Problem,
    TensorKind,
)

RATES = {"Q4_K": ((1, 10e9), (4, 8e9), (16, 4e9), (128, 1e9)), OUTPUT: ((1, 20e9), (4, 10e9))}
CPU = DeviceFacts("cpu", 10**9, decode_bytes_s=5e9, prefill_bytes_s=50e9, rates=RATES)
PLAIN = DeviceFacts("cpu", 10**9, decode_bytes_s=5e9, prefill_bytes_s=50e9)
MODEL = ModelFacts(
    "m", (1000, 1000), 100, 500, 0, 64, layer_types={"Q4_K": (600, 1000), "Q6_K": (400, 0)}, input_row_bytes=1
)


@pytest.mark.parametrize(("width", "rate"), [(1, 10e9), (4, 8e9), (16, 4e9), (128, 1e9)])
def test_a_measured_width_takes_what_was_measured(width: int, rate: float) -> None:
    assert compute_s(CPU, {"Q4_K": 1e9}, width) == pytest.approx(1e9 / rate)


def test_between_measured_widths_time_grows_evenly() -> None:
    four, ten, sixteen = (compute_s(CPU, {"Q4_K": 1e9}, width) for width in (4, 10, 16))
    assert ten == pytest.approx((four + sixteen) / 2)


def test_beyond_the_largest_width_each_token_costs_the_same() -> None:
    assert compute_s(CPU, {"Q4_K": 1e9}, 512) == pytest.approx(4 * compute_s(CPU, {"Q4_K": 1e9}, 128))
    assert compute_s(CPU, {OUTPUT: 1e9}, 16) == pytest.approx(4 * compute_s(CPU, {OUTPUT: 1e9}, 4))


def test_below_the_smallest_width_a_step_takes_as_long_as_that() -> None:
    only_wide = DeviceFacts("cpu", 10**9, decode_bytes_s=5e9, rates={"Q4_K": ((16, 4e9),)})
    assert compute_s(only_wide, {"Q4_K": 1e9}, 2) == pytest.approx(1e9 / 4e9)


@pytest.mark.parametrize(("width", "expected"), [(1, 0.2), (4, 0.2), (100, 2.0)])
def test_a_type_that_was_not_measured_is_as_fast_as_the_whole(width: int, expected: float) -> None:
    for device in (CPU, PLAIN):
        assert compute_s(device, {"Q6_K": 1e9}, width) == pytest.approx(expected)


def test_types_add_up() -> None:
    mixed = compute_s(CPU, {"Q4_K": 1e9, "Q6_K": 2e9, OUTPUT: 3e9})
    assert mixed == pytest.approx(1e9 / 10e9 + 2e9 / 5e9 + 3e9 / 20e9)


def test_layers_and_output_cost_what_their_types_do() -> None:
    problem = Problem(MODEL, (NodeFacts("a", 10**9, (CPU,)),), "a", 8)
    plan = complete(Plan(n_layers=2, head="a", visits=(Visit("a", 0, 2),)), problem)
    layers, output = (visit.layers for visit in pass_cost(plan, problem, width=4, rows=2).visits)
    q4, q6 = 1 / 8e9, 1 / 5e9
    assert [layer.compute_s for layer in layers] == pytest.approx([600 * q4 + 400 * q6, 1000 * q4])
    assert [block.compute_s for block in output] == pytest.approx([compute_s(CPU, {OUTPUT: 500}, 2)])


def test_experts_that_no_token_chose_are_not_gone_through() -> None:
    model = ModelFacts(
        "m", (1000,), 0, 0, 0, 64, layer_types={"Q4_K": (750,), "Q6_K": (250,)},
        expert_bytes=(800,), n_experts=8, n_experts_used=2,
    )  # fmt: skip
    assert touched_types(model, 0) == pytest.approx({"Q4_K": 300, "Q6_K": 100})
    assert sum(touched_types(model, 0, width=2).values()) == pytest.approx(200 + 800 * (1 - 0.75**2))
    assert sum(touched_types(model, 0, width=500).values()) == pytest.approx(1000)


def test_bytes_that_only_grow_on_the_device_take_no_longer() -> None:
    """Rates were measured by the bytes in the file."""
    grown = DeviceFacts("gpu", 10**9, growth={"Q4_K": 2.0}, decode_bytes_s=5e9)
    problem = Problem(MODEL, (NodeFacts("a", 10**9, (grown,)),), "a", 8)
    plan = complete(Plan(n_layers=2, head="a", visits=(Visit("a", 0, 2),)), problem)
    assert pass_cost(plan, problem).compute_s("a") == pytest.approx(2500 / 5e9)


# ---------------------------------------------------------------- experts from disk

MB = 10**6


def sparse(matrix_bytes: int) -> ModelFacts:
    """Four layers of eight experts with three matrices."""
    stacks = (3 * 8 * matrix_bytes,) * 4
    model = ModelFacts("moe", stacks, 0, MB, 0, 64, expert_bytes=stacks, n_experts=8, n_experts_used=2)
    return msgspec.structs.replace(model, largest_tensor_bytes=matrix_bytes)


def test_experts_are_read_at_the_rate_of_pieces_from_anywhere_the_larger_the_nearer_to_that_in_order() -> None:
    node = NodeFacts("a", 10**9, disk_bytes_s=2e9, random_bytes_s=1e9)
    rates = [demand_bytes_s(node, sparse(size)) for size in (RANDOM_BYTES // 8, RANDOM_BYTES, 32 * RANDOM_BYTES)]
    assert rates == pytest.approx([2e9 / 9, 1e9, 64e9 / 33])


def test_of_matrices_of_several_sizes_the_mean_counts() -> None:
    node = NodeFacts("a", 10**9, disk_bytes_s=2e9, random_bytes_s=1e9)
    kinds = tuple(TensorKind("Q4_K", 8 * size) for size in (RANDOM_BYTES // 2, RANDOM_BYTES, 3 * RANDOM_BYTES // 2))
    known = msgspec.structs.replace(sparse(12345), kinds=kinds, layer_kinds=((0, 1, 2),) * 4, tensor_bytes=((),) * 4)
    assert demand_bytes_s(node, known) == pytest.approx(1e9)


def test_without_experts_or_a_rate_of_pieces_all_is_read_as_in_order() -> None:
    model = sparse(RANDOM_BYTES)
    assert demand_bytes_s(NodeFacts("a", 1, disk_bytes_s=2e9), model) == 2e9
    assert demand_bytes_s(NodeFacts("a", 1, disk_bytes_s=2e9, random_bytes_s=3e9), model) == pytest.approx(2e9)
    assert demand_bytes_s(NodeFacts("a", 1, disk_bytes_s=2e9, random_bytes_s=1e9), MODEL) == 2e9
    assert demand_bytes_s(NodeFacts("a", 1, random_bytes_s=1e9), model) == 0


def test_a_token_waits_for_its_experts_as_long_as_pieces_from_anywhere_take() -> None:
    model, device = sparse(RANDOM_BYTES), DeviceFacts("cpu", 80 * MB, decode_bytes_s=1e15)
    times = []
    for random_bytes_s in (0.0, 1e9):
        node = NodeFacts("a", 80 * MB, (device,), 2e9, random_bytes_s=random_bytes_s)
        problem = Problem(model, (node,), "a", 1)
        plan = complete(Plan(4, "a", (Visit("a", 0, 4),)), problem)
        assert 0 < plan.residency[0].streamed_bytes <= sum(model.expert_bytes), "experts alone"
        times.append(predict(plan, problem).token_s)
    assert times[1] == pytest.approx(2 * times[0], rel=1e-3)
