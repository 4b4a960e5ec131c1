"""What `prima serve` tells on its way."""

from __future__ import annotations

from prima_core.commands.serve import MOST_VISITS, describe_plan
from prima_core.plan.explanation import Explanation, LeftOut
from prima_core.plan.plan import Plan, Residency, Split, Visit

SPLIT = Split("torch:cuda:0", 0, 20), Split("numpy:cpu", 20, 32)


def told(*visits: Visit, needs: tuple[tuple[str, str], ...]) -> list[str]:
    residency = tuple(Residency(node, device, 1, 1) for node, device in needs)
    return list(describe_plan(Plan(32, "a", visits, residency)))


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


def test_what_lines_do_not_say_is_told_in_words() -> None:
    streaming = (Residency("a", "cpu", 500, 1, streamed_bytes=300, buffer_bytes=100), Residency("b", "cpu", 100, 1))
    visits = (Visit("a", 0, 20), Visit("b", 20, 32))
    *lines, words = describe_plan(Plan(32, "a", visits, streaming))
    assert len(lines) == 2
    assert words.strip() == (
        "a computes 20 of 32 layers (62 %) and reads 300 B from disk for every token; "
        "b computes 12 of 32 layers (38 %)."
    )
    out = Explanation(left_out=(LeftOut("phone", None, "no layer fits its memory"),))
    alone = Plan(32, "a", (Visit("a", 0, 32),), (Residency("a", "cpu", 1, 1),), explanation=out)
    assert [line.strip() for line in describe_plan(alone)] == [
        "a computes 32 of 32 layers (100 %). phone was left out: no layer fits its memory."
    ]


def test_many_visits_are_not_listed_one_by_one() -> None:
    visits = tuple(Visit("ab"[index % 2], index, index + 1) for index in range(MOST_VISITS + 1))
    needs = (Residency("a", "cpu", 1, 1), Residency("b", "cpu", 1, 1))
    [words] = describe_plan(Plan(len(visits), "a", visits, needs))
    assert words.strip() == "a computes 5 of 9 layers (56 %); b computes 4 of 9 layers (44 %)."
