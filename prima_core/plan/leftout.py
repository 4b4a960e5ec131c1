"""What a plan would cost with the nodes that it leaves out.

No solver can be told to use a node. So the plan is changed by hand: some layers of a neighbour go to the node, between
two visits, where its links are shortest; as many as is best, at least one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.check import complete
from prima_core.plan.explanation import LeftOut
from prima_core.plan.fill import split_streaming
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import Problem
from prima_core.plan.words import duration

MOST_TRIED = 4
"""Nodes, the fastest: others that nobody needs cost time to look at, and more per token."""
_MOST_PLACES = 3
FORETOLD_LAYERS = 4_096
"""Layers that are foretold, for all these nodes together: about a second. Then the best that was found has to do."""
_LEAST_TRIALS = 2
"""Of a node, however many layers the model has."""


def left_out(plan: Plan, problem: Problem) -> tuple[LeftOut, ...]:
    """The nodes without a part of a completed plan, the fastest first."""
    nodes = [node for node in problem.nodes if node.name not in plan.nodes]
    nodes.sort(key=lambda node: -max(place.decode_bytes_s for place in node.places))
    chosen = nodes[:MOST_TRIED] if plan.forecast else []
    n_trials = max(_LEAST_TRIALS, FORETOLD_LAYERS // max(1, problem.model.n_layers * len(chosen)))
    tried = [_tried(plan, plan.forecast, problem, node.name, n_trials) for node in chosen if plan.forecast]
    return (*tried, *(LeftOut(node.name) for node in nodes[len(tried) :]))


def _tried(plan: Plan, forecast: Forecast, problem: Problem, name: str, n_trials: int) -> LeftOut:
    places, has_many = problem.node(name).places, problem.goal is Goal.TTFT or problem.width > 1
    if any(not place.decode_bytes_s or (has_many and not place.prefill_bytes_s) for place in places):
        return LeftOut(name, why="how fast it computes is not known")
    best = min(_trials(plan, problem, name, n_trials), key=lambda trial: trial[0], default=None)
    if best is None:
        return LeftOut(name, why="no layer fits its memory")
    return LeftOut(name, best[0], _why(forecast, best[1], problem.goal))


Trial = tuple[float, Forecast]
"""What is to be least, and what else was foretold."""


def _openings(plan: Plan, problem: Problem, name: str) -> list[tuple[int, bool]]:
    """Where its visit could be, with the index of the visit behind it, and whether it takes layers from the one before
    it: between some pairs of nodes, those with the shortest links to it."""
    stops = (plan.head, *plan.stops)
    first: dict[tuple[str, str], int] = {}
    for index, way in enumerate(pairwise(stops)):
        first.setdefault(way, index)
    near = sorted(first, key=lambda way: _detour_s(problem, name, *way))[:_MOST_PLACES]
    sides = [(first[way], before) for way in near for before in (True, False)]
    return [(at, before) for at, before in sides if 0 <= at - before < len(plan.visits)]


def _detour_s(problem: Problem, name: str, source: str, target: str) -> float:
    ways = ((source, name), (name, target))
    n_bytes = problem.model.activation_bytes
    return sum(problem.link(*way).time_s(n_bytes) for way in ways) - problem.link(source, target).time_s(n_bytes)


def _trials(plan: Plan, problem: Problem, name: str, n_trials: int) -> Iterator[Trial]:
    """At each opening, the nearest first, with 1, 2, 4, ... layers of the neighbour, as long as that gets better."""
    for at, takes_before in _openings(plan, problem, name):
        neighbour, n_layers, best_s = plan.visits[at - takes_before], 1, float("inf")
        while n_layers <= len(neighbour.layers) and n_trials:
            n_trials -= 1
            cut = neighbour.stop - n_layers if takes_before else neighbour.start + n_layers
            found = _foretold(plan, problem, name, neighbour, cut, takes_before)
            if found is None or found[0] >= best_s:
                break
            best_s, n_layers = found[0], 2 * n_layers
            yield found


def _foretold(plan: Plan, problem: Problem, name: str, neighbour: Visit, cut: int, takes_behind: bool) -> Trial | None:
    """With the neighbour's layers behind the cut, or before it, on the node."""
    start, stop = neighbour.start, neighbour.stop
    with suppress(PlanError):
        [own] = split_streaming(problem, [Visit(name, cut, stop) if takes_behind else Visit(name, start, cut)])
        pair = (_clipped(neighbour, start, cut), own) if takes_behind else (own, _clipped(neighbour, cut, stop))
        visits = [visit for one in plan.visits for visit in (pair if one is neighbour else (one,)) if len(visit.layers)]
        changed = msgspec.structs.replace(plan, visits=tuple(visits), residency=(), gather_bytes=0)
        forecast = predict(complete(changed, problem), problem)
        return goal_s(forecast, problem.goal), forecast
    return None


def _clipped(visit: Visit, start: int, stop: int) -> Visit:
    parts = ((part.device, max(start, part.start), min(stop, part.stop)) for part in visit.split)
    split = tuple(Split(device, begin, end) for device, begin, end in parts if begin < end)
    return Visit(visit.node, start, stop, split)


def _why(plan: Forecast, other: Forecast, goal: Goal) -> str:
    """What takes longest of what is more, of a token; what prompts take is not known so closely."""
    if goal is not Goal.LATENCY:
        return ""
    before = plan.shares_s
    more_s = {what: time_s - before[what] for what, time_s in other.shares_s.items()}
    most = max(more_s, key=lambda what: more_s[what])
    return f"{most} {'take' if most == 'links' else 'takes'} {duration(max(0.0, more_s[most]))} longer"
