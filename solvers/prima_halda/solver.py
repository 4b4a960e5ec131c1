"""The solver `halda`: the relaxation gives starts, the simulation judges them, local search makes the best of them.

Deterministic: work is counted in simulated layers, not in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from random import Random

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Certificate, Plan, Residency, Split, Visit
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import Problem
from prima_core.plan.proportional import proportional
from prima_core.plan.slots import slots_of
from prima_core.plan.stream import gather_bytes
from prima_halda.cluster import Cluster, unknown_disk, unknown_rate
from prima_halda.improve import Budget, improved, kicked, repaired, shaken, with_better_buffers
from prima_halda.judge import Judge, Trial
from prima_halda.memory import Load, Memory, Way
from prima_halda.outputs import with_best_output
from prima_halda.packing import packed, packings
from prima_halda.ring import EXACT_UP_TO
from prima_halda.shortage import check_layers, check_use
from prima_halda.starts import bound_s, differs, starts
from prima_halda.timing import turns_of
from prima_halda.visits import WORTH, with_fewer_visits

_STEPS = 9_000
_STEPS_SHARED = 60_000
"""Simulated layers, and as many more for each of the nodes to share, as what few nodes do is simulated sooner: about a
third of a second."""
_FEWER_STEPS = 80_000
"""For one node: with more of them each trial takes longer."""
_AS_GOOD = 1.0005
"""So near its bound no plan is searched for a better one."""
_TRIED_OUT = 4096
"""Ways to lay layers on places: if there are no more, all are judged."""
_TRIED_LONGER = 6
_FINALISTS = 4
_REPAIR_STEPS = 6_000
_FEW_LAYERS = 24
_KICKS = 200
_KICK_STEPS = 40_000


def solve(problem: Problem) -> Plan:
    """Raises PlanError when no plan was found, with what is lacking. Where rates are not known the plan is that of
    `even`, and its certificate says why."""
    check_layers(problem)
    return with_best_output(problem, _solved(problem), _solved)


def _solved(problem: Problem) -> Plan:
    """With the output part where the problem has it."""
    why = unknown_rate(problem)
    if why:
        plan = _shared_out(problem)
        return msgspec.structs.replace(plan, solver="halda", certificate=Certificate(about=f"as `even`: {why}"))
    cluster = Cluster.of(problem)
    judge = Judge(cluster)
    trials = _judged(judge, _all_starts(judge, starts(judge)))
    if not trials:
        plan = _shared_out(problem)  # what it finds, though the judge did not
        why = unknown_disk(problem) or "the search found none"
        return msgspec.structs.replace(plan, solver="halda", certificate=Certificate(about=f"as `even`: {why}"))
    least_s = bound_s(judge)
    if differs(cluster) or trials[0].time_s > _AS_GOOD * least_s:
        trials = sorted([*_searched(judge, trials), *trials], key=lambda trial: trial.time_s)
    plan = fastest(cluster, trials)
    if not problem.rounds:
        budget = Budget(judge, judge.n_steps + _FEWER_STEPS // len(cluster.members))
        thin = with_fewer_visits(judge, trials, trials[0], budget)
        plan = _worth_it(cluster, plan, thin)
    forecast = predict(complete(plan, problem), problem)
    check_use(forecast)
    return _certified(plan, least_s, goal_s(forecast, problem.goal))


def _worth_it(cluster: Cluster, plan: Plan, thin: Trial) -> Plan:
    """The plan with fewer visits, if the last word about it is good as well."""
    times = _foretold(cluster, plan), _foretold(cluster, other := fastest(cluster, [thin]))
    is_worth_it = len(other.visits) < len(plan.visits) and times[1] <= WORTH * times[0]
    return other if is_worth_it or times[1] < times[0] else plan


def _foretold(cluster: Cluster, plan: Plan) -> float:
    problem = cluster.problem
    return goal_s(predict(complete(plan, problem), problem), problem.goal)


def _searched(judge: Judge, trials: Sequence[Trial]) -> list[Trial]:
    cluster = judge.cluster
    n_steps = _STEPS + _STEPS_SHARED // len(cluster.members)
    budget = Budget(judge, judge.n_steps + n_steps)
    rounds = cluster.problem.rounds
    best = [improved(judge, trial, budget, same_visits=bool(rounds)) for trial in trials[:_TRIED_LONGER]]
    if not rounds and cluster.n_layers <= _FEW_LAYERS:
        best.append(_far_from(judge, min(best, key=lambda trial: trial.time_s)))
    budget = Budget(judge, judge.n_steps + n_steps // 2)
    best.sort(key=lambda trial: trial.time_s)
    return [with_better_buffers(judge, trial, budget) for trial in best[:_FINALISTS]]


def _shared_out(problem: Problem) -> Plan:
    plan = proportional(problem)
    complete(plan, problem)
    return plan


# ---------------------------------------------------------------- starts


def _all_starts(judge: Judge, ways: Sequence[Way]) -> list[Way]:
    """With those of them that cannot be repaired as far as they can; and all there are, where there are few."""
    cluster = judge.cluster
    if cluster.problem.rounds and any(judge.trial(way) for way in ways):
        return list(ways)  # what follows has other visits than were asked for
    ways = [*ways, packed(cluster)]
    if cluster.n_layers <= _FEW_LAYERS and differs(cluster):
        ways += packings(cluster)
    repairs = Budget(judge, judge.n_steps + _REPAIR_STEPS)
    ways = [*ways, *(repaired(judge, way, repairs) for way in ways)]
    if cluster.n_layers <= _FEW_LAYERS and not any(judge.trial(way) for way in ways):
        ways += _shaken_until_possible(judge, ways)
    if len(cluster.places) ** cluster.n_layers <= _TRIED_OUT and not cluster.problem.rounds:
        ways += product(range(len(cluster.places)), repeat=cluster.n_layers)
    return list(dict.fromkeys(ways))


def _shaken_until_possible(judge: Judge, ways: Sequence[Way]) -> list[Way]:
    """A way that can be, from ways that cannot; or none, where none was found."""
    chance, budget = Random(judge.cluster.n_layers), Budget(judge, judge.n_steps + _KICK_STEPS)
    while ways and not budget.is_spent:
        way = repaired(judge, shaken(judge.cluster, chance.choice(ways), chance), budget)
        if judge.trial(way) is not None:
            return [way]
    return []


def _far_from(judge: Judge, trial: Trial) -> Trial:
    """By steps that a local search would not take, and back to where it leads from there."""
    chance = Random(judge.cluster.n_layers)  # the same in every run
    kicks = Budget(judge, judge.n_steps + _KICK_STEPS)
    for _ in range(_KICKS):
        if kicks.is_spent:
            break
        trial = kicked(judge, trial, chance, kicks)
    return trial


def _judged(judge: Judge, ways: Sequence[Way]) -> list[Trial]:
    trials = [trial for way in dict.fromkeys(ways) if (trial := judge.trial(way)) is not None]
    return sorted(trials, key=lambda trial: trial.time_s)


# ---------------------------------------------------------------- the plan


def fastest(cluster: Cluster, trials: Sequence[Trial]) -> Plan:
    """By the last word of `complete` and `predict`."""
    plans = list[tuple[float, int, Plan]]()
    for trial in trials:
        for plan in (plan_of(cluster, trial), plan_with_buffers(cluster, trial)):
            try:
                plans.append((_foretold(cluster, plan), len(plans), plan))
            except PlanError:
                continue
        if len(plans) >= 2 * _FINALISTS:
            break
    if not plans:
        return _shared_out(cluster.problem)
    return min(plans, key=lambda item: item[:2])[2]


def plan_of(cluster: Cluster, trial: Trial) -> Plan:
    visits = []
    for index, runs in turns_of(cluster, trial.way):
        member = cluster.members[index]
        parts = tuple(Split(cluster.places[number].id, start, stop) for number, start, stop in runs)
        split = parts if len(member.places) > 1 else ()
        visits.append(Visit(member.name, parts[0].start, parts[-1].stop, split))
    return Plan(cluster.n_layers, cluster.problem.head, tuple(visits), solver="halda", output=cluster.problem.output)


def plan_with_buffers(cluster: Cluster, trial: Trial) -> Plan:
    """The same with the trial's buffers, or with the smallest ones that these layers' tensors need to come evenly."""
    loads = Memory(cluster).loads(trial.way) or {}
    residency = tuple(_residency(cluster, load, trial.buffers[index]) for index, load in loads.items())
    names = [load.overload.node for load in loads.values()]
    gather = gather_bytes(cluster.problem, names) if names else 0
    return msgspec.structs.replace(plan_of(cluster, trial), residency=residency, gather_bytes=gather)


def _residency(cluster: Cluster, load: Load, buffer_bytes: int) -> Residency:
    model = cluster.problem.model
    tensors, streaming = model.tensor_bytes, cluster.problem.node(load.overload.node).streaming_device
    exact = replace(
        load.overload,
        tensor_bytes=tuple(tensors[layer] for layer in load.layers) if tensors else (),
        slots=slots_of(model, streaming, load.layers) if streaming is not None and streaming.copies else None,
    )
    size = max(min(buffer_bytes, exact.most_buffer), exact.fluent_buffer)
    return Residency(
        node=exact.node,
        device=exact.device,
        weight_bytes=0,
        kv_bytes=0,
        streamed_bytes=exact.streamed_bytes(size),
        buffer_bytes=size,
    )


def _certified(plan: Plan, bound_s: float, time_s: float) -> Plan:
    """A bound that the plan itself is below is none."""
    ring = "exact" if len(plan.nodes) <= EXACT_UP_TO + 1 else "by local search"
    about = "the bound is of layers that are alike and visits that are evenly spaced"
    if bound_s > _AS_GOOD * time_s:
        bound_s, about = 0.0, "no bound is known, as layers differ too much"
    about = f"{about}; order of nodes: {ring}"
    return msgspec.structs.replace(plan, certificate=Certificate(bound_s, about))
