"""Layers in proportion to memory: the reference solver. Slow machines are not spared.

Every node gets one run of layers, the head first, then the others as given. Think of the layers as a line whose length
is their bytes (weights and KV), cut in proportion to the nodes' room; each cut moves to the nearest border between two
layers, and from there only as far as it must so that every run fits its node. On a node with several devices the first
takes as many layers as it can.

A model that does not fit is cut in the same way, and every node streams what is too much for it. Then the nodes are
visited in several rounds, each with a part of every node's layers, if that is foretold to be faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

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


def solve(problem: Problem) -> Plan:
    """Spreads over all nodes, also where fewer would do; a node whose share is less than a layer may get none.

    Raises PlanError when no such plan fits the nodes in this order.
    """
    head = problem.node(problem.head)
    nodes = (head, *(node for node in problem.nodes if node is not head))
    cuts = _cuts(problem, nodes)
    if cuts is not None:
        return _in_rounds(problem, nodes, cuts)
    cuts = _streaming_cuts(problem, nodes) if problem.streaming else None
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
    return Plan(n_layers=problem.model.n_layers, head=problem.head, visits=visits, solver="even")


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


def _streaming_cuts(problem: Problem, nodes: Sequence[NodeFacts]) -> list[int] | None:
    """In proportion to room, where every node may also stream; no more layers than it can take at all."""
    most = [most_streaming(problem, node.name) for node in nodes]
    if sum(most) < problem.model.n_layers:
        return None
    behind = [sum(most[index + 1 :]) for index in range(len(nodes))]
    cuts = [0]
    table = problem.model.input_bytes if problem.model.input_row_bytes else 0
    for wanted, can, rest in zip(_wanted_cuts(problem, nodes, table), most, behind, strict=True):
        least = max(cuts[-1], problem.model.n_layers - rest)
        cuts.append(max(least, min(wanted, cuts[-1] + can)))
    return cuts


def _cuts(problem: Problem, nodes: tuple[NodeFacts, ...]) -> list[int] | None:
    """Where the nodes' runs begin and end, n_nodes + 1 layer numbers; None when it does not fit. Exact in integers."""
    earliest = _earliest_cuts(problem, nodes)
    if earliest is None or earliest[0] > 0:
        return None
    cuts = [0]
    for node, wanted, least in zip(nodes, _wanted_cuts(problem, nodes), earliest[1:], strict=True):
        latest = latest_stop(problem, node.name, cuts[-1]) or cuts[-1]
        cuts.append(max(least, min(wanted, latest)))
    return cuts


def _wanted_cuts(problem: Problem, nodes: Sequence[NodeFacts], left_out: int = 0) -> list[int]:
    """Where the nodes' runs would end in proportion to their room. `left_out`: of the head's ends, not in memory."""
    sizes = [problem.layers_bytes(layer, layer + 1) for layer in range(problem.model.n_layers)]
    ends = [0, *accumulate(sizes)]  # ends[i]: bytes of the first i layers
    fixed = [max(0, problem.fixed_bytes(node.name) - left_out) for node in nodes]
    shares = list(accumulate(max(0, node.room_bytes - size) for node, size in zip(nodes, fixed, strict=True)))
    return [_nearest(ends, share, shares[-1]) for share in shares]


def _earliest_cuts(problem: Problem, nodes: tuple[NodeFacts, ...]) -> list[int] | None:
    """The smallest cuts from which the nodes behind can still take all the rest, each as much as fits. None: the head
    has not even room for the ends of the model."""
    cuts = [problem.model.n_layers]
    for node in reversed(nodes):
        start = earliest_start(problem, node.name, cuts[-1])
        if start is None:
            return None
        cuts.append(start)
    return cuts[::-1]


def _nearest(ends: list[int], share: int, total: int) -> int:
    """The border between layers that is nearest to share / total of all bytes, the earlier one of two."""
    return min(range(len(ends)), key=lambda cut: abs(ends[cut] * total - ends[-1] * share))


def _does_not_fit(problem: Problem, nodes: tuple[NodeFacts, ...]) -> PlanError:
    fixed, layers_bytes = problem.fixed_bytes(problem.head), problem.layers_bytes(0, problem.model.n_layers)
    have = ", ".join(f"{node.name} {_gb(node.room_bytes)}" for node in nodes)
    return PlanError(
        f"{problem.model.name} does not fit: its layers with {problem.kv_tokens} KV positions need"
        f" {_gb(layers_bytes)}, and input and output part {_gb(fixed)} on {problem.head}; the nodes may use: {have}",
        hint="add a node, use a smaller model or a shorter context (-c)",
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"
