"""Rates that are not known, where others are."""

from __future__ import annotations

import msgspec

from prima_core.plan.check import complete
from prima_core.plan.guess import vouched, with_guesses
from prima_core.plan.plan import Certificate
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem, TypeRates
from tests.plan.home import ATTIC, DESK, LAPTOP, MB, TWO_VISITS, home

UNKNOWN = {"decode_bytes_s": 0.0, "prefill_bytes_s": 0.0}


def forgotten(node: NodeFacts, *ids: str, **rates: float) -> NodeFacts:
    """With devices of which nothing is known, or not all."""
    devices = (
        msgspec.structs.replace(device, **(rates or UNKNOWN)) if device.id in ids else device for device in node.devices
    )
    return msgspec.structs.replace(node, devices=tuple(devices))


def rates(problem: Problem, name: str) -> list[tuple[float, float]]:
    return [(device.decode_bytes_s, device.prefill_bytes_s) for device in problem.node(name).places]


def test_what_is_known_stays_as_it_is() -> None:
    problem = home(DESK, LAPTOP, ATTIC)
    assert with_guesses(problem) == (problem, ())


def test_where_nothing_is_known_nothing_is_guessed() -> None:
    problem = Problem(home(DESK).model, (NodeFacts("desk", 10), NodeFacts("laptop", 10)), "desk", 10)
    assert with_guesses(problem) == (problem, ())


def test_a_device_is_taken_to_be_as_the_slowest_of_its_kind() -> None:
    guessed, said = with_guesses(home(DESK, forgotten(LAPTOP, "numpy:cpu"), ATTIC))
    assert rates(guessed, "laptop") == [(9e9, 9e11)]
    like = "as numpy:cpu on attic, the slowest of its kind"
    assert said == (f"how fast numpy:cpu on laptop computes was not measured: it is taken to be {like}",)
    second = msgspec.structs.replace(DESK.devices[0], id="torch:cuda:1", **UNKNOWN)
    two = msgspec.structs.replace(DESK, devices=(second, *DESK.devices))
    assert rates(with_guesses(home(two))[0], "desk")[0] == (200e9, 1e13), "as the other GPU, not as the CPU"


def test_a_device_of_a_kind_of_its_own_is_taken_to_be_as_the_slowest_of_all() -> None:
    guessed, [said] = with_guesses(home(forgotten(DESK, "torch:cuda:0"), LAPTOP))
    assert rates(guessed, "desk")[0] == (12e9, 12e11)
    assert said.endswith("as numpy:cpu on laptop, the slowest of all")


def test_what_many_tokens_gain_is_guessed_apart() -> None:
    guessed, [said] = with_guesses(home(DESK, forgotten(LAPTOP, "numpy:cpu", prefill_bytes_s=0.0), ATTIC))
    assert rates(guessed, "laptop") == [(12e9, 12e11)]
    like = "numpy:cpu on attic, the slowest of its kind"
    assert said == f"how fast numpy:cpu on laptop is with many tokens was not measured: it is taken to gain as {like}"


def test_the_types_of_the_other_device_are_taken_with_its_rates() -> None:
    by_type: TypeRates = {"Q4_K": ((1, 5e9), (16, 6e10))}
    device = DeviceFacts("numpy:cpu", 400 * MB, decode_bytes_s=5e9, prefill_bytes_s=1e11, rates=by_type)
    attic = msgspec.structs.replace(ATTIC, devices=(device,))
    assert with_guesses(home(attic, forgotten(LAPTOP, "numpy:cpu")))[0].node("laptop").devices[0].rates == by_type


def test_a_node_without_devices_has_one_with_a_guess() -> None:
    guessed, [said] = with_guesses(home(DESK, msgspec.structs.replace(LAPTOP, devices=())))
    assert rates(guessed, "laptop") == [(15e9, 15e11)]
    assert said.startswith("how fast the memory on laptop computes was not measured")


def test_a_plan_is_foretold_with_guesses() -> None:
    problem, _ = with_guesses(home(DESK, forgotten(LAPTOP, "numpy:cpu"), ATTIC))
    assert predict(complete(TWO_VISITS, problem), problem).token_s > 0


def test_who_certifies_a_plan_is_told_what_was_guessed() -> None:
    plan = msgspec.structs.replace(TWO_VISITS, certificate=Certificate(1.0, "exact"))
    assert vouched(plan, ("a", "b")).certificate == Certificate(1.0, "exact; a; b")
    assert vouched(plan, ()) == plan
    assert vouched(TWO_VISITS, ("a",)) == TWO_VISITS
