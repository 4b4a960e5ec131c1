"""What `prima serve` tells on its way."""

from __future__ import annotations

from prima_core.commands.serve import describe_plan
from prima_core.node.driver import State, Status
from prima_core.plan.plan import Plan, Residency, Split, Visit

SPLIT = Split("torch:cuda:0", 0, 20), Split("numpy:cpu", 20, 32)


def told(*visits: Visit, needs: tuple[tuple[str, str], ...]) -> list[str]:
    residency = tuple(Residency(node, device, 1, 1) for node, device in needs)
    return list(describe_plan(Status(State.SERVING, plan=Plan(32, "a", visits, residency))))


def test_who_computes_what_is_told_where_there_is_more_than_one_device() -> None:
    assert told(Visit("a", 0, 32, SPLIT), needs=(("a", "torch:cuda:0"), ("a", "numpy:cpu"))) == [
        "  layers   0 to  19 on a (torch:cuda:0)",
        "  layers  20 to  31 on a (numpy:cpu)",
    ]
    assert told(Visit("a", 0, 9), Visit("b", 9, 32), needs=(("a", "numpy:cpu"), ("b", "numpy:cpu"))) == [
        "  layers   0 to   8 on a",
        "  layers   9 to  31 on b",
    ]
    assert told(Visit("a", 0, 32), needs=(("a", "numpy:cpu"),)) == []
