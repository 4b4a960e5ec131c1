"""A plan as a person reads it."""

from __future__ import annotations

import msgspec
import pytest

from prima_core.interfaces import Goal
from prima_core.plan.changes import changes
from prima_core.plan.check import complete
from prima_core.plan.explanation import Explanation, LeftOut, WhatIf
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.words import duration, left_out, size, summary, told
from tests.plan import home as homes
from tests.plan.home import ATTIC, DESK, LAPTOP, MB, TWO_VISITS, home, on_desk

HOME = home(DESK, LAPTOP, ATTIC)
PLAN = homes.told(TWO_VISITS, HOME)
assert PLAN.forecast is not None
TIME_S = PLAN.forecast.token_s


def explained(*what_ifs: WhatIf, **facts: object) -> Plan:
    explanation = Explanation(time_s=TIME_S, what_ifs=what_ifs)
    return msgspec.structs.replace(PLAN, explanation=msgspec.structs.replace(explanation, **facts))


def section(plan: Plan, title: str) -> list[str]:
    return dict(told(plan))[title]


def test_each_node_has_a_sentence_with_its_share_its_visits_devices_memory_and_disk() -> None:
    desk, laptop, attic = section(PLAN, "Who does what")
    assert desk.startswith(
        "desk (the head) computes 4 of 8 layers (50 %) in 2 visits: 2 on torch:cuda:0, 2 on numpy:cpu;"
    )
    assert "from disk for every token, " in desk
    assert laptop == (
        "laptop computes 3 of 8 layers (38 %) in 2 visits; it keeps 600 MB of weights and 3 MB of KV in memory."
    )
    assert attic.startswith("attic computes 1 of 8 layers (12 %); it keeps")


def test_reading_is_told_as_hidden_or_with_how_long_it_is_waited_for() -> None:
    def reading(token_s: float, stall_s: float) -> str:
        assert PLAN.forecast is not None
        nodes = [msgspec.structs.replace(node, stall_s=stall_s) for node in PLAN.forecast.nodes]
        forecast = msgspec.structs.replace(PLAN.forecast, token_s=token_s, nodes=tuple(nodes))
        return section(msgspec.structs.replace(PLAN, forecast=forecast), "Who does what")[0].split("token, ")[1]

    assert reading(1.0, 0.001) == "hidden behind the others' work."
    assert reading(1.0, 0.0311) == "and waits 31.1 ms for that."
    alone = homes.told(Plan(8, "desk", (on_desk(0, 8, 2),)), HOME)
    assert ", and waits " in section(alone, "Who does what")[0]


def test_what_the_host_of_a_gpu_keeps_is_told_with_what_is_read() -> None:
    gpu = homes.node("desk", 500, 15e9, gpu_mb=900).places[0]
    lone = msgspec.structs.replace(DESK, memory_bytes=500 * MB, devices=(msgspec.structs.replace(gpu, copies=True),))
    plan = homes.told(Plan(8, "desk", (Visit("desk", 0, 8),)), home(lone))
    [sentence] = section(plan, "Who does what")
    [need], [node] = plan.residency, plan.forecast.nodes if plan.forecast else ()
    host, read = size(need.host_bytes), size(node.read_bytes)
    assert f"in memory, copies {host} from the host's for every token and reads {read} from disk" in sentence
    [[more], *_] = changes(plan, plan.forecast, home(lone)) if plan.forecast else [[]]
    assert (more.change, more.node) == ("memory", "desk")
    plenty = msgspec.structs.replace(lone, memory_bytes=5000 * MB)
    plan = homes.told(plan, home(plenty))
    assert "from disk" not in section(plan, "Who does what")[0]
    assert plan.forecast is not None
    assert changes(plan, plan.forecast, home(plenty)) == [[], [], [], []]


def test_a_head_without_layers_computes_the_output() -> None:
    large = homes.node("attic", 3000, 9e9)
    plan = complete(Plan(8, "desk", (Visit("attic", 0, 8),)), home(DESK, large))
    assert section(plan, "Who does what")[0].startswith("desk (the head) computes the output only; it keeps 200 MB")


def test_the_time_is_told_with_what_it_goes_to_and_what_limits_it() -> None:
    token, prompt, limit = section(PLAN, "How long it takes")
    assert token.startswith(f"A token takes {duration(TIME_S)}, {1 / TIME_S:.3g} tokens a second: computing ")
    assert "links" in token
    assert prompt.startswith("The first token after a prompt of 512 comes after ")
    assert limit.startswith("What limits it most: ")


def test_where_steps_overlap_their_times_are_not_added_up() -> None:
    plan = explained(WhatIf("disk", "desk", TIME_S / 2), goal=Goal.THROUGHPUT)
    assert ":" not in section(plan, "How long it takes")[0]
    assert section(plan, "What would help") == [
        f"A disk twice as fast in desk: {duration(TIME_S / 2)} less for a token of each (50 %)."
    ]


def test_what_would_help_most_comes_first_and_what_gives_nothing_last() -> None:
    plan = explained(
        WhatIf("memory", "attic", TIME_S),
        WhatIf("cable", "laptop", 0.9 * TIME_S),
        WhatIf("memory", "desk", 0.5 * TIME_S),
        WhatIf("disk", "desk", 0.995 * TIME_S),
        n_untried=3,
    )
    assert section(plan, "What would help") == [
        f"1 GB more of memory on desk: {duration(0.5 * TIME_S)} less for a token (50 %).",
        f"A cable to laptop (1 Gbit/s, 0.3 ms): {duration(0.1 * TIME_S)} less for a token (10 %).",
        "Nothing to speak of: a disk twice as fast in desk; 1 GB more of memory on attic.",
        "3 changes that promised less were not worked out.",
    ]


def test_where_nothing_was_tried_that_could_help_there_is_no_title_for_it() -> None:
    plan = explained(WhatIf("without", "attic", 2 * TIME_S))
    assert [title for title, _ in told(plan)] == ["Who does what", "How long it takes", "What each is worth"]


def test_what_each_node_is_worth_is_what_a_token_takes_without_it() -> None:
    plan = explained(
        WhatIf("without", "attic", 2 * TIME_S),
        WhatIf("without", "laptop", None),
        WhatIf("without", "nas", TIME_S),
        WhatIf("without", "pi", TIME_S / 2),
    )
    assert section(plan, "What each is worth") == [
        f"Without attic a token would take {duration(TIME_S)} longer ({duration(2 * TIME_S)}).",
        "Without laptop there would be no plan.",
        "Without nas a token would take about as long.",
        f"Without pi a token would take {duration(TIME_S / 2)} less ({duration(TIME_S / 2)}).",
    ]


def test_what_was_not_planned_for_is_told_as_the_least_it_gives_or_as_not_worked_out() -> None:
    plan = explained(
        WhatIf("memory", "desk", 0.5 * TIME_S, is_estimate=True),
        WhatIf("disk", "desk", TIME_S),
        WhatIf("memory", "attic", TIME_S, is_estimate=True),
        WhatIf("without", "attic", None, is_estimate=True),
        WhatIf("without", "laptop", None, is_estimate=True),
    )
    assert section(plan, "What would help") == [
        f"1 GB more of memory on desk: at least {duration(0.5 * TIME_S)} less for a token (50 %).",
        "Nothing to speak of: a disk twice as fast in desk.",
        "Nothing to speak of, as long as the layers stay where they are: 1 GB more of memory on attic.",
        "So large a cluster is not planned anew for each change: with the layers elsewhere some may give more.",
    ]
    assert section(plan, "What each is worth") == [
        "Without attic or laptop: not worked out, as that takes a plan of its own."
    ]


def test_a_guess_is_told_with_the_times_that_come_of_it() -> None:
    plan = explained(guesses=("the CPU on attic was not measured, and is taken to be slow",))
    said = "The CPU on attic was not measured, and is taken to be slow."
    assert section(plan, "How long it takes")[-1] == said
    assert summary(plan).endswith(said)


def test_who_was_left_out_is_told_with_cost_and_reason_and_others_together() -> None:
    plan = explained(
        left_out=(
            LeftOut("phone", TIME_S + 0.012, "links take 12 ms longer"),
            LeftOut("old", TIME_S - 0.001),
            LeftOut("spare", TIME_S * (1 + 1e-6), "links take 3 ms longer"),
            LeftOut("a", None, "no layer fits its memory"),
            LeftOut("b"),
            LeftOut("c", None, "no layer fits its memory"),
            LeftOut("d", None, "no layer fits its memory"),
        )
    )
    sentences = [
        "phone was left out, as with it a token would take 12 ms longer: links take 12 ms longer.",
        "old was left out, though with it a token would take 1 ms less.",
        "spare was left out, as with it a token would take just as long.",
        "a, c and d were left out: no layer fits its memory.",
        "b was left out.",
    ]
    assert section(plan, "Who was left out") == left_out(plan) == sentences
    assert summary(plan).startswith("desk computes 4 of 8 layers (50 %) and reads ")
    assert summary(plan).endswith("attic computes 1 of 8 layers (12 %). " + " ".join(sentences))


def test_a_plan_without_a_forecast_has_no_times() -> None:
    plan = complete(TWO_VISITS, HOME)
    assert [title for title, _ in told(plan)] == ["Who does what"]
    assert "and reads" in summary(plan)


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.0, "0 ms"),
        (0.0123456, "12.3 ms"),
        (0.4144, "414 ms"),
        (0.99999, "1,000 ms"),
        (1.234, "1.23 s"),
        (1234.5, "1,234 s"),
    ],
)
def test_durations_have_three_digits(time_s: float, text: str) -> None:
    assert duration(time_s) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1500, "1.5 kB"), (999_600_000, "1,000 MB"), (3_140_000_000, "3.14 GB")]
)
def test_sizes_have_three_digits(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
