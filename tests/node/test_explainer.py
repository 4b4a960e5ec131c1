"""Explanations come from a thread of their own, of the plan that was asked about last."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.node.explainer import Explainer
from prima_core.node.member import Member
from prima_core.plan.explanation import Explanation
from prima_core.plan.plan import Plan, Visit
from prima_core.testing.cluster import DEADLINE_S

PLANS = [Plan(4, "a", (Visit("a", 0, 4),), solver=f"{number}") for number in range(3)]


class Slow:
    """Explains when it is let; fails for plans of the solver `broken`."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.began = threading.Semaphore(0)
        self.asked: list[str] = []

    def __call__(self, plan: Plan, members: tuple[Member, ...]) -> Plan:
        self.asked.append(plan.solver)
        self.began.release()
        assert self.may_go.wait(DEADLINE_S)
        if plan.solver == "broken":
            raise PlanError("it cannot be explained")
        if plan.solver == "mad":
            raise ZeroDivisionError
        return msgspec.structs.replace(plan, explanation=Explanation(time_s=1.0))


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def explainer(slow: Slow) -> Iterator[Explainer]:
    one = Explainer(slow)
    one.start()
    yield one
    slow.may_go.set()
    one.close()


def test_who_asks_gets_the_plan_at_once_and_its_explanation_when_it_is_there(slow: Slow, explainer: Explainer) -> None:
    explainer.ask(PLANS[0], ())
    assert explainer.explained(PLANS[0]) is PLANS[0]
    slow.may_go.set()
    told = explainer.explained(PLANS[0], DEADLINE_S)
    assert told.explanation == Explanation(time_s=1.0)
    assert explainer.explained(PLANS[1]) is PLANS[1], "nobody asked about that one"


def test_only_the_plan_that_was_asked_about_last_is_explained(slow: Slow, explainer: Explainer) -> None:
    explainer.ask(PLANS[0], ())
    assert slow.began.acquire(timeout=DEADLINE_S)
    explainer.ask(PLANS[1], ())
    explainer.ask(PLANS[2], ())
    slow.may_go.set()
    assert explainer.explained(PLANS[2], DEADLINE_S).explanation is not None
    assert slow.asked == ["0", "2"]


@pytest.mark.parametrize("solver", ["broken", "mad"])
def test_an_explanation_that_fails_costs_nothing_else(slow: Slow, explainer: Explainer, solver: str) -> None:
    plan = msgspec.structs.replace(PLANS[0], solver=solver)
    slow.may_go.set()
    explainer.ask(plan, ())
    assert explainer.explained(plan, DEADLINE_S) is plan
    explainer.ask(PLANS[1], ())
    assert explainer.explained(PLANS[1], DEADLINE_S).explanation is not None


def test_it_ends_though_nobody_asked() -> None:
    one = Explainer(Slow())
    one.start()
    one.close()
