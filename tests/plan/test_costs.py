"""How long a device computes, from the rates that were measured of it."""

from __future__ import annotations

import pytest

from prima_core.plan.check import complete
from prima_core.plan.costs import compute_s, pass_cost, touched_types
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import OUTPUT, DeviceFacts, ModelFacts, NodeFacts, Problem

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
