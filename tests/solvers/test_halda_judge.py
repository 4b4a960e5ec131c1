"""The quick judge of `halda` says what `complete` and `predict` say."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import msgspec
import pytest

from bench.solvers import small_problem, time_s
from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_halda.cluster import Cluster
from prima_halda.improve import runs_of, way_of
from prima_halda.judge import Judge, Judges, Trial
from prima_halda.solver import plan_of, plan_with_buffers


def told(plan: Plan, problem: Problem) -> float | None:
    try:
        return time_s(plan, problem)
    except PlanError:
        return None


def with_experts(problem: Problem) -> Problem:
    experts = tuple(3 * size // 4 for size in problem.model.layer_bytes)
    model = msgspec.structs.replace(
        problem.model, expert_bytes=experts, n_experts=8, n_experts_used=2, largest_tensor_bytes=4_000_000
    )
    nodes = tuple(
        msgspec.structs.replace(node, random_bytes_s=share * node.disk_bytes_s)
        for node, share in zip(problem.nodes, itertools.cycle((0.5, 0.0, 1.2)), strict=False)
    )
    return msgspec.structs.replace(problem, model=model, nodes=nodes)


def with_lone_gpus(problem: Problem) -> Problem:
    """Each node has one, and of its host's memory twice as much or little."""
    nodes = []
    for node, share in zip(problem.nodes, itertools.cycle((2.0, 0.6)), strict=False):
        device = msgspec.structs.replace(node.places[0], shares_host=False, copies=True, copy_bytes_s=1e10)
        host = int(share * node.memory_bytes)
        nodes.append(msgspec.structs.replace(node, devices=(device,), memory_bytes=host))
    return msgspec.structs.replace(problem, nodes=tuple(nodes))


@pytest.mark.parametrize("kind", ["plain", "experts", "gpus", "kept", "width", *Goal])
def test_the_judge_and_the_originals_agree_on_what_can_be_and_how_long_it_takes(kind: str) -> None:
    chance, n_agreed, n_streaming = random.Random(kind), 0, 0
    for seed in range(60):
        problem = small_problem(seed, Goal(kind) if kind in tuple(Goal) else Goal.LATENCY)
        if kind == "width":
            problem = msgspec.structs.replace(small_problem(seed, Goal.THROUGHPUT), goal=Goal.LATENCY)
        elif kind == "experts":
            problem = with_experts(problem)
        elif kind == "gpus":
            problem = with_lone_gpus(problem)
        elif kind == "kept":
            problem = msgspec.structs.replace(problem, streaming=False)
        cluster = Cluster.of(problem)
        for _ in range(4):
            way = tuple(sorted(chance.choices(range(len(cluster.places)), k=cluster.n_layers)))
            cluster = cluster.with_output(chance.choice(Judges.of(problem).outputs))
            trial = Judge(cluster).trial(way)
            if trial is None:
                assert told(plan_of(cluster, Trial(way, 0.0, 0.0, {}, cluster.output.member)), problem) is None, (
                    seed,
                    way,
                )
                continue
            assert told(plan_with_buffers(cluster, trial), problem) == pytest.approx(trial.time_s, rel=1e-5), (
                seed,
                way,
            )
            n_agreed += 1
            n_streaming += bool(trial.buffers)
    assert n_agreed > 40
    assert (n_streaming > 20) is (kind != "kept")


def test_a_way_that_is_no_faster_than_its_rival_is_given_up() -> None:
    problem = small_problem(0)
    cluster = Cluster.of(problem)
    judge, found = Judge(cluster), list[Trial]()
    for way in itertools.islice(itertools.product(range(len(cluster.places)), repeat=cluster.n_layers), 0, 2000, 7):
        trial = judge.trial(way)
        if trial is not None:
            found.append(trial)
    found.sort(key=lambda trial: trial.time_s)
    assert len(found) > 3
    assert judge.trial(found[-1].way, found[0]) is None
    assert judge.trial(found[0].way, found[-1]) == found[0]


@pytest.mark.parametrize("kind", ["plain", "experts", "gpus"])
def test_a_way_that_is_faster_than_its_rival_is_never_given_up(kind: str) -> None:
    chance, n_streaming = random.Random(kind), 0
    for seed in range(60):
        problem = small_problem(seed)
        if kind == "experts":
            problem = with_experts(problem)
        elif kind == "gpus":
            problem = with_lone_gpus(problem)
        judge = Judge(Cluster.of(problem).with_output(chance.choice(Judges.of(problem).outputs)))
        for _ in range(4):
            trial = judge.trial(
                tuple(sorted(chance.choices(range(len(judge.cluster.places)), k=problem.model.n_layers)))
            )
            if trial is not None:
                rival = replace(trial, time_s=1.001 * trial.time_s)
                assert judge.trial(trial.way, rival) == trial, (seed, trial.way)
                n_streaming += bool(trial.buffers)
    assert n_streaming > 15


def test_ways_and_runs_are_the_same_told_otherwise() -> None:
    assert runs_of((0, 0, 2, 1, 1)) == ((0, 2), (2, 1), (1, 2))
    assert way_of(runs_of((0, 0, 2, 1, 1))) == (0, 0, 2, 1, 1)


@pytest.mark.parametrize("goal", Goal)
def test_a_cluster_with_the_output_part_elsewhere_is_that_of_the_problem_asked_so(goal: Goal) -> None:
    n_compared = 0
    for seed in range(12):
        problem = small_problem(seed, goal)
        cluster = Cluster.of(problem)
        for member in cluster.members:
            assert cluster.with_output(member.index) == Cluster.of(problem.with_output(member.name))
            assert cluster.with_output(member.index).with_output(cluster.head) == cluster
            n_compared += 1
    assert n_compared > 30
