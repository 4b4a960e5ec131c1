"""The solver `halda`: the relaxation gives starts, the simulation judges them, local search makes the best of them.

Deterministic: work is counted in simulated layers, not in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Certificate, Plan, Residency, Split, Visit
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import Problem
from prima_core.plan.slots import slots_of
from prima_core.plan.stream import gather_bytes
from prima_halda.cluster import Cluster, unknown_disk, unknown_rate
from prima_halda.improve import Budget, improved, kicked, repaired, shaken, with_better_buffers
from prima_halda.judge import Judges, Trial
from prima_halda.memory import Load, Memory
from prima_halda.outputs import with_output_elsewhere
from prima_halda.packing import packed, packings
from prima_halda.ring import EXACT_UP_TO
from prima_halda.shortage import check_layers, check_use, shared_out
from prima_halda.starts import Start, bound_s, differs, starts, starts_with
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
_FEW_NODES = 8
_IN_REACH = 1.1
_FINALISTS = 4
_FOLLOWED = 1.002
"""Who is slower by more, as the judge has it, than the fastest has no last word."""
_BETTER = 0.995
"""For less nobody is asked to do the head's work."""
_MUCH_SLOWER = 1.3
_REPAIR_STEPS = 6_000
_FEW_LAYERS = 24
_KICKS = 200
_KICK_STEPS = 40_000


def solve(problem: Problem) -> Plan:
    """Raises PlanError when no plan was found, with what is lacking. Where rates are not known the plan is that of
    `even`, and its certificate says why."""
    check_layers(problem)
    if why := unknown_rate(problem):
        return _as_even(problem, why)
    judges = Judges.of(problem)
    trials = _judged(judges, _all_starts(judges, starts(judges)))
    if not trials:  # `even` may find what the judge did not
        return _as_even(problem, unknown_disk(problem) or "the search found none")
    least_s = bound_s(judges)
    if differs(judges.base.cluster) or trials[0].time_s > _AS_GOOD * least_s:
        trials = sorted([*_searched(judges, trials), *trials], key=lambda trial: trial.time_s)
    found = _with_best_output(judges, trials)
    if found is None:
        return _as_even(problem, "of the search's plans none can be")
    if not problem.rounds:
        found = _with_fewer_visits(judges, trials, found)
    check_use(predict(complete(found.plan, problem), problem))
    return _certified(found, least_s)


def _as_even(problem: Problem, why: str) -> Plan:
    certificate = Certificate(about=f"as `even`: {why}")
    return msgspec.structs.replace(shared_out(problem), solver="halda", certificate=certificate)


def _with_best_output(judges: Judges, trials: Sequence[Trial]) -> Final | None:
    """Another node does the head's work only if that is worth it."""
    best, head = fastest(judges, trials), judges.base.cluster.head
    if best is None or not best.plan.output:
        return best
    of_head = [trial for trial in trials if trial.output == head and trial.time_s <= best.time_s / _BETTER]
    on_head = fastest(judges, of_head)
    return on_head if on_head is not None and on_head.time_s <= best.time_s / _BETTER else best


def _with_fewer_visits(judges: Judges, trials: Sequence[Trial], found: Final) -> Final:
    """The plan with fewer visits, if the last word about it is good as well."""
    judge, n_members = judges[found.trial.output], len(judges.base.cluster.members)
    budget = Budget.more(judges.work, _FEWER_STEPS // n_members)
    alike = [trial for trial in trials if trial.output == found.trial.output]
    other = fastest(judges, [with_fewer_visits(judge, alike, alike[0], budget)])
    if other is None:
        return found
    is_worth_it = len(other.plan.visits) < len(found.plan.visits) and other.time_s <= WORTH * found.time_s
    return other if is_worth_it or other.time_s < found.time_s else found


def _searched(judges: Judges, trials: Sequence[Trial]) -> list[Trial]:
    cluster, work = judges.base.cluster, judges.work
    n_steps = _STEPS + _STEPS_SHARED // len(cluster.members)
    rounds = bool(cluster.problem.rounds)
    best = _improved(judges, trials, n_steps)
    if len(cluster.members) <= _FEW_NODES:
        best = sorted([*best, *_with_those_in_use(judges, best[0], n_steps // 2)], key=_time_s)
    best += with_output_elsewhere(judges, min(best, key=_time_s), Budget.more(work, n_steps // 2))
    if not rounds and cluster.n_layers <= _FEW_LAYERS:
        best.append(_far_from(judges, min(best, key=_time_s)))
    budget = Budget.more(work, n_steps // 2)
    best.sort(key=_time_s)
    return [*best, *(with_better_buffers(judges[trial.output], trial, budget) for trial in best[:_FINALISTS])]


def _with_those_in_use(judges: Judges, best: Trial, n_steps: int) -> list[Trial]:
    """From the starts for the nodes that it uses alone: others draw some of theirs to them."""
    used = {judges.base.cluster.places[number].member for number in best.way}
    near = [trial for trial in _judged(judges, starts_with(judges, used)) if trial.time_s <= _IN_REACH * best.time_s]
    return _improved(judges, near, n_steps)


def _improved(judges: Judges, trials: Sequence[Trial], n_steps: int) -> list[Trial]:
    """The first of them, each with half of the work that is left, the best of what they become first."""
    budget, rounds, found = Budget.more(judges.work, n_steps), bool(judges.base.cluster.problem.rounds), list[Trial]()
    for trial in trials[:_TRIED_LONGER]:
        share = Budget.more(judges.work, budget.left // 2)
        found.append(improved(judges[trial.output], trial, share, same_visits=rounds))
    return sorted(found, key=_time_s)


def _time_s(trial: Trial) -> float:
    return trial.time_s


# ---------------------------------------------------------------- starts


def _all_starts(judges: Judges, found: Sequence[Start]) -> list[Start]:
    """With those of them that cannot be repaired as far as they can; and all there are, where there are few."""
    cluster = judges.base.cluster
    if cluster.problem.rounds and any(judges[output].trial(way) for output, way in found):
        return list(found)  # what follows has other visits than were asked for
    has_few = cluster.n_layers <= _FEW_LAYERS
    outputs = judges.outputs if has_few or not found else dict.fromkeys(output for output, _ in found)
    every = [*found, *((output, packed(judges[output].cluster)) for output in outputs)]
    if has_few and differs(cluster):
        every += [(output, way) for output in outputs for way in packings(judges[output].cluster)]
    repairs = Budget.more(judges.work, _REPAIR_STEPS)
    every += [(output, repaired(judges[output], way, repairs)) for output, way in every]
    if has_few and not any(judges[output].trial(way) for output, way in every):
        every += _shaken_until_possible(judges, every)
    n_ways = len(judges.outputs) * len(cluster.places) ** cluster.n_layers
    if n_ways <= _TRIED_OUT and not cluster.problem.rounds:
        every += product(judges.outputs, product(range(len(cluster.places)), repeat=cluster.n_layers))
    return list(dict.fromkeys(every))


def _shaken_until_possible(judges: Judges, starts: Sequence[Start]) -> list[Start]:
    """A way that can be, from ways that cannot; or none, where none was found."""
    chance, budget = Random(judges.base.cluster.n_layers), Budget.more(judges.work, _KICK_STEPS)
    while starts and not budget.is_spent:
        output, way = chance.choice(starts)
        way = repaired(judges[output], shaken(judges.base.cluster, way, chance), budget)
        if judges[output].trial(way) is not None:
            return [(output, way)]
    return []


def _far_from(judges: Judges, trial: Trial) -> Trial:
    """By steps that a local search would not take, and back to where it leads from there: with the output part where it
    is, or anywhere."""
    chance = Random(judges.base.cluster.n_layers)  # the same in every run
    kicks = Budget.more(judges.work, _KICK_STEPS)
    for _ in range(_KICKS):
        if kicks.is_spent:
            break
        output = chance.choice((trial.output, chance.choice(judges.outputs)))
        trial = kicked(judges[output], trial, chance, kicks)
    return trial


def _judged(judges: Judges, found: Sequence[Start]) -> list[Trial]:
    """Without those that are much slower than another one, the best first."""
    trials, limit = list[Trial](), None
    for output, way in dict.fromkeys(found):
        trial = judges[output].trial(way, limit)
        if trial is not None:
            trials.append(trial)
            most_s = _MUCH_SLOWER * min(trial.time_s, limit.time_s / _MUCH_SLOWER if limit else float("inf"))
            limit = Trial((), most_s, float("inf"), {}, output)
    return sorted(trials, key=_time_s)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True)
class Final:
    """A trial's plan, and its time by the last word of `complete` and `predict`."""

    plan: Plan
    time_s: float
    trial: Trial


def fastest(judges: Judges, trials: Sequence[Trial]) -> Final | None:
    """Of trials, the best of which come first; None: none can be."""
    finals = list[Final]()
    for trial in trials:
        if finals and (len(finals) >= 2 * _FINALISTS or trial.time_s > _FOLLOWED * min(map(_final_s, finals))):
            break
        cluster = judges[trial.output].cluster
        for plan in dict.fromkeys((plan_of(cluster, trial), plan_with_buffers(cluster, trial))):
            try:
                finals.append(Final(plan, _foretold(cluster, plan), trial))
            except PlanError:
                continue
    return min(finals, key=_final_s, default=None)


def _final_s(final: Final) -> float:
    return final.time_s


def _foretold(cluster: Cluster, plan: Plan) -> float:
    problem = cluster.problem
    return goal_s(predict(complete(plan, problem), problem), problem.goal)


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


def _certified(final: Final, bound_s: float) -> Plan:
    """A bound that the plan itself is below is none."""
    plan = final.plan
    ring = "exact" if len(plan.nodes) <= EXACT_UP_TO + 1 else "by local search"
    about = "the bound is of layers that are alike and visits that are evenly spaced"
    if bound_s > _AS_GOOD * final.time_s:
        bound_s, about = 0.0, "no bound is known, as layers differ too much"
    about = f"{about}; order of nodes: {ring}"
    return msgspec.structs.replace(plan, certificate=Certificate(bound_s, about))
