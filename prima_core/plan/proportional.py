"""Layers in proportion to something that each node has: the base of solvers that do not search. Slow machines are not
spared.

Every node gets one run of layers, the head first, then the others as given. Think of the layers as a line whose length
is their bytes (weights and KV), cut in proportion to the nodes' shares; each cut moves to the nearest border between
two layers, and from there only as far as it must so that every run fits its node. On a node with several devices the
first takes as many layers as it can.

A model that does not fit is cut in the same way, and every node streams what is too much for it. Then the nodes are
visited in several rounds, each with a part of every node's layers, if that is foretold to be faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, pairwise

import msgspec

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.fill import earliest_start, latest_stop, most_streaming, split_streaming, split_visits
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.predict import predict
from prima_core.plan.problem import NodeFacts, Problem

ROUNDS = (1, 2, 4, 8)
"""What is tried for a model that does not fit, when the user asks for nothing else."""
_WORTH = 1.02
"""More rounds for less than this are not worth their hops, which are never all measured."""


def proportional(problem: Problem, shares: Mapping[str, float] | None = None, solver: str = "") -> Plan:
    """By the `shares` of the nodes, 0 or more by name; None: by the room that they have. Spreads over all nodes, also
    where fewer would do; a node whose share is less than a layer may get none.

    Raises PlanError when no such plan fits the nodes in this order.
    """
    head = problem.node(problem.head)
    nodes = (head, *(node for node in problem.nodes if node is not head))
    plan = _plan_of(problem, nodes, shares)
    return msgspec.structs.replace(plan, solver=solver)


def _plan_of(problem: Problem, nodes: Sequence[NodeFacts], shares: Mapping[str, float] | None) -> Plan:
    earliest = _earliest_cuts(problem, nodes)
    if earliest is not None and earliest[0] == 0:
        return _in_rounds(problem, nodes, _cuts(problem, nodes, earliest, _ends(problem, nodes, shares)))
    cuts = _streaming_cuts(problem, nodes, shares) if problem.streaming else None
    if cuts is None:
        raise _does_not_fit(problem, nodes)
    asked = (problem.rounds,) if problem.rounds else ROUNDS
    return _fastest(problem, [_streaming_plan(problem, nodes, cuts, n_rounds) for n_rounds in asked])


def _in_rounds(problem: Problem, nodes: Sequence[NodeFacts], cuts: Sequence[int]) -> Plan:
    """As many rounds as were asked for, or fewer where layers of other sizes would not fit a node. One, unless asked:
    what fits gains nothing by more hops."""
    for n_rounds in range(problem.rounds, 1, -1):
        try:
            plan = _plan(problem, split_visits(problem, _visits(nodes, cuts, n_rounds)))
            complete(plan, problem)
        except PlanError:
            continue
        return plan
    return _plan(problem, split_visits(problem, _visits(nodes, cuts, 1)))


def _visits(nodes: Sequence[NodeFacts], cuts: Sequence[int], n_rounds: int) -> list[Visit]:
    """Every node's layers, as many as between its cuts, spread over the rounds; who would follow itself goes on."""
    counts = [stop - start for start, stop in pairwise(cuts)]
    names: list[str] = []
    for number in range(n_rounds):
        for node, count in zip(nodes, counts, strict=True):
            names += [node.name] * ((number + 1) * count // n_rounds - number * count // n_rounds)
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    ends = accumulate(length for _, length in runs)
    return [Visit(name, end - length, end) for (name, length), end in zip(runs, ends, strict=True)]


def _plan(problem: Problem, visits: tuple[Visit, ...]) -> Plan:
    return Plan(n_layers=problem.model.n_layers, head=problem.head, visits=visits, output=problem.output)


# ---------------------------------------------------------------- models that do not fit


def _streaming_plan(problem: Problem, nodes: Sequence[NodeFacts], cuts: Sequence[int], n_rounds: int) -> Plan:
    return _plan(problem, split_streaming(problem, _visits(nodes, cuts, n_rounds)))


def _fastest(problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The first of them that is about as fast as any; the first of all where no time can be foretold."""
    complete(plans[0], problem)  # so that its error is the one that is told
    times = [_token_s(problem, plan) for plan in plans]
    best = min((time_s for time_s in times if time_s is not None), default=None)
    if best is None:
        return plans[0]
    return next(plan for plan, time_s in zip(plans, times, strict=True) if time_s and time_s <= _WORTH * best)


def _token_s(problem: Problem, plan: Plan) -> float | None:
    try:
        return predict(complete(plan, problem), problem).token_s
    except PlanError:
        return None


def _streaming_cuts(
    problem: Problem, nodes: Sequence[NodeFacts], shares: Mapping[str, float] | None
) -> list[int] | None:
    """Where every node may also stream; no more layers than it can take at all."""
    most = [most_streaming(problem, node.name) for node in nodes]
    if sum(most) < problem.model.n_layers:
        return None
    behind = [sum(most[index + 1 :]) for index in range(len(nodes))]
    cuts = [0]
    for wanted, can, rest in zip(_wanted_cuts(problem, _ends(problem, nodes, shares, True)), most, behind, strict=True):
        least = max(cuts[-1], problem.model.n_layers - rest)
        cuts.append(max(least, min(wanted, cuts[-1] + can)))
    return cuts


def _cuts(problem: Problem, nodes: Sequence[NodeFacts], earliest: Sequence[int], ends: Sequence[float]) -> list[int]:
    """Where the nodes' runs begin and end when all weights stay, n_nodes + 1 layer numbers."""
    cuts = [0]
    for node, wanted, least in zip(nodes, _wanted_cuts(problem, ends), earliest[1:], strict=True):
        latest = latest_stop(problem, node.name, cuts[-1]) or cuts[-1]
        cuts.append(max(least, min(wanted, latest)))
    return cuts


def _ends(
    problem: Problem, nodes: Sequence[NodeFacts], shares: Mapping[str, float] | None, streaming: bool = False
) -> list[float]:
    """Where the nodes' parts of the line end. `streaming`: an embedding that is looked up is not in memory."""
    if shares is not None:
        return list(accumulate(shares[node.name] for node in nodes))
    fixed = [
        max(0, problem.fixed_bytes(node.name) - (problem.table_bytes(node.name) if streaming else 0)) for node in nodes
    ]
    return list(accumulate(max(0, node.room_bytes - size) for node, size in zip(nodes, fixed, strict=True)))


def _wanted_cuts(problem: Problem, ends: Sequence[float]) -> list[int]:
    """The borders between layers that are nearest to these points of the line, the earlier one of two."""
    sizes = [problem.layers_bytes(layer, layer + 1) for layer in range(problem.model.n_layers)]
    borders = [0, *accumulate(sizes)]  # borders[i]: bytes of the first i layers
    return [min(range(len(borders)), key=lambda cut: abs(borders[cut] * ends[-1] - borders[-1] * end)) for end in ends]


def _earliest_cuts(problem: Problem, nodes: Sequence[NodeFacts]) -> list[int] | None:
    """The smallest cuts from which the nodes behind can still take all the rest, each as much as fits. None: the head
    has not even room for the ends of the model."""
    cuts = [problem.model.n_layers]
    for node in reversed(nodes):
        start = earliest_start(problem, node.name, cuts[-1])
        if start is None:
            return None
        cuts.append(start)
    return cuts[::-1]


def _does_not_fit(problem: Problem, nodes: Sequence[NodeFacts]) -> PlanError:
    fixed, layers_bytes = problem.fixed_bytes(problem.head), problem.layers_bytes(0, problem.model.n_layers)
    have = ", ".join(f"{node.name} {_gb(node.room_bytes)}" for node in nodes)
    return PlanError(
        f"{problem.model.name} does not fit: its layers with {problem.kv_tokens} KV positions need"
        f" {_gb(layers_bytes)}, and input and output part {_gb(fixed)} on {problem.head}; the nodes may use:"
        f" {have}{_least(problem)}",
        hint="add a node, use a smaller model or a shorter context (-c)",
    )


def _least(problem: Problem) -> str:
    """What has to be in memory though weights are read from disk."""
    if not problem.streaming:
        return ""
    kv_bytes = problem.model.kv_bytes_per_token_layer * problem.kv_tokens * problem.model.n_layers
    return (
        f"; where weights are read from disk, K and V ({_gb(kv_bytes)} in all) still have to fit, and on each node a"
        f" buffer for some layers (of {_gb(max(problem.model.layer_bytes))})"
    )


def _gb(n_bytes: int) -> str:
    gb = n_bytes / 1e9
    return f"{gb:,.0f} GB" if gb >= 100 else f"{gb:.3g} GB"
