"""Layers in proportion to memory: the reference solver. Slow machines are not spared and disks are not used.

Every node gets one run of layers, the head first, then the others as given. Think of the layers as a line whose length
is their bytes (weights and KV), cut in proportion to the nodes' room; each cut moves to the nearest border between two
layers, and from there only as far as it must so that every run fits its node. On a node with several devices the first
takes as many layers as it can.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from prima_core.errors import PlanError
from prima_core.plan.fill import earliest_start, latest_stop, split_visits
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import NodeFacts, Problem


def solve(problem: Problem) -> Plan:
    """Spreads over all nodes, also where fewer would do; a node whose share is less than a layer may get none.

    Raises PlanError when no such plan fits the nodes in this order.
    """
    head = problem.node(problem.head)
    nodes = (head, *(node for node in problem.nodes if node is not head))
    cuts = _cuts(problem, nodes)
    if cuts is None:
        raise _does_not_fit(problem, nodes)
    runs = zip(nodes, pairwise(cuts), strict=True)
    visits = [Visit(node.name, start, stop) for node, (start, stop) in runs if start < stop]
    n_layers = problem.model.n_layers
    return Plan(n_layers=n_layers, head=problem.head, visits=split_visits(problem, visits), solver="even")


def _cuts(problem: Problem, nodes: tuple[NodeFacts, ...]) -> list[int] | None:
    """Where the nodes' runs begin and end, n_nodes + 1 layer numbers; None when it does not fit. Exact in integers."""
    earliest = _earliest_cuts(problem, nodes)
    if earliest is None or earliest[0] > 0:
        return None
    sizes = [problem.layers_bytes(layer, layer + 1) for layer in range(problem.model.n_layers)]
    ends = [0, *accumulate(sizes)]  # ends[i]: bytes of the first i layers
    shares = [0, *accumulate(max(0, node.room_bytes - problem.fixed_bytes(node.name)) for node in nodes)]
    cuts = [0]
    for index, node in enumerate(nodes):
        wanted = _nearest(ends, shares[index + 1], shares[-1])
        latest = latest_stop(problem, node.name, cuts[-1]) or cuts[-1]
        cuts.append(max(earliest[index + 1], min(wanted, latest)))
    return cuts


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
