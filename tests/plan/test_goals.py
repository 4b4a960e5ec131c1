"""Forecasts for each goal: what can be worked out by hand."""

from __future__ import annotations

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem

MB = 10**6
MODEL = ModelFacts("m", (100 * MB,) * 8, 0, 0, 1000, 4096, largest_tensor_bytes=20 * MB, activation_bytes=1000)


def problem_of(*memory_mb: int, prefill: float = 300e9, **more: object) -> Problem:
    """A layer's token takes 10 ms, and no longer for up to 30 tokens."""
    nodes = tuple(
        NodeFacts(name, size * MB, (DeviceFacts("cpu", size * MB, decode_bytes_s=10e9, prefill_bytes_s=prefill),), 1e9)
        for name, size in zip("ab", memory_mb, strict=False)
    )
    return msgspec.structs.replace(Problem(MODEL, nodes, "a", 100), **more)


HALVES = Plan(8, "a", (Visit("a", 0, 4), Visit("b", 4, 8)))
UNEVEN = Plan(8, "a", (Visit("a", 0, 2), Visit("b", 2, 8)))
ALONE = Plan(8, "a", (Visit("a", 0, 8),))


def told(plan: Plan, problem: Problem) -> float:
    return goal_s(predict(complete(plan, problem), problem), problem.goal)


def test_a_pass_of_several_tokens_gives_each_sequence_one() -> None:
    forecast = predict(complete(ALONE, problem_of(2000)), problem_of(2000, width=60))
    assert forecast.token_s == pytest.approx(8 * 0.02)
    assert forecast.tokens_s == pytest.approx(60 / 0.16)


def test_many_sequences_go_round_as_fast_as_the_slowest_stage_lets_them() -> None:
    """Three steps follow each other, as many as there are visits and one; each node takes one at a time."""
    many = problem_of(2000, 2000, goal=Goal.THROUGHPUT, width=6)
    assert told(HALVES, many) == pytest.approx(3 * 0.04)
    assert told(UNEVEN, many) == pytest.approx(3 * 0.06)
    two = msgspec.structs.replace(many, width=2)
    assert told(HALVES, two) == pytest.approx(0.08), "no node is asked for more than it can do"
    slow = msgspec.structs.replace(many, links=(LinkFacts("a", "b", 0.1), LinkFacts("b", "a", 0.01)))
    assert told(HALVES, slow) == pytest.approx(3 * 0.1)
    assert predict(complete(HALVES, slow), slow).limit == "the links to b"
    assert predict(complete(UNEVEN, many), many).limit == "computing on b"


def test_where_weights_are_read_all_sequences_are_one_step() -> None:
    one = problem_of(500)
    many = msgspec.structs.replace(one, goal=Goal.THROUGHPUT, width=8)
    plan = complete(ALONE, one)
    assert predict(plan, many).token_s == pytest.approx(predict(plan, one).token_s)
    assert predict(plan, many).tokens_s == pytest.approx(8 * predict(plan, one).tokens_s)


def test_what_tokens_look_back_on_is_gone_through_once_for_each_sequence() -> None:
    long = problem_of(2000, n_past=10_000)
    each_s = 8 * 10_000 * 1000 / 10e9
    assert told(ALONE, long) == pytest.approx(0.08 + each_s)
    assert told(ALONE, msgspec.structs.replace(long, width=4)) == pytest.approx(0.08 + 4 * each_s)


def test_a_long_prompt_looks_back_on_half_of_itself() -> None:
    """32 chunks of 128 tokens, on one node."""
    problem = problem_of(2000, goal=Goal.TTFT, n_prompt=4096)
    weights_s, past_s = 800 * MB * 128 / 300e9, 8 * 2048 * 1000 * 128 / 300e9
    assert told(ALONE, problem) == pytest.approx(32 * (weights_s + past_s))


@pytest.mark.parametrize(("row_bytes", "chunk"), [(0, 128), (100_000, 156), (1000, 512)])
def test_chunks_of_a_forecast_are_those_that_are_served(row_bytes: int, chunk: int) -> None:
    """500 MB of memory gather 15.6 MB: of small rows two chunks of 512, which are read for once."""
    model = msgspec.structs.replace(MODEL, row_bytes=row_bytes, kv_bytes_per_token_layer=0)
    problem = problem_of(500, prefill=1e15, model=model, goal=Goal.TTFT, n_prompt=1024)
    plan = complete(ALONE, problem)
    [need] = plan.residency
    n_readings, n_chunks = {128: (8, 8), 156: (7, 7), 512: (1, 2)}[chunk]
    computing_s = (n_chunks - n_readings) * 0.08
    assert told(ALONE, problem) == pytest.approx(n_readings * need.streamed_bytes / 1e9 + computing_s, rel=0.01)


def test_the_goal_of_a_first_token_needs_rates_of_prefill() -> None:
    problem = problem_of(2000, prefill=0.0)
    with pytest.raises(PlanError, match="prefill"):
        goal_s(predict(complete(ALONE, problem), problem), Goal.TTFT)
    with pytest.raises(PlanError, match="prefill_bytes_s of cpu on a is not known"):
        told(ALONE, msgspec.structs.replace(problem, goal=Goal.TTFT))
