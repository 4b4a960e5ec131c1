"""Layers in proportion to memory: the reference solver. Slow machines are not spared and disks are not used.

Every node gets one run of layers, the head first, then the others as given. Think of the layers as a line whose length
is their bytes (weights and KV), cut in proportion to the nodes' room; each cut moves to the nearest border between two
layers, and from there only as far as it must so that every run fits its node.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from prima_core.errors import PlanError
from prima_core.plan.plan import Plan, Visit
from prima_core.plan.problem import NodeFacts, Problem


def solve(problem: Problem) -> Plan:
    """Spreads over all nodes, also where fewer would do; a node whose share is less than a layer may get none.

    Raises PlanError when no such plan fits the nodes in this order.
    """
    head = problem.node(problem.head)
    nodes = (head, *(node for node in problem.nodes if node is not head))
    rooms = [node.memory_bytes - problem.fixed_bytes(node.name) for node in nodes]
    sizes = [problem.layers_bytes(layer, layer + 1) for layer in range(problem.model.n_layers)]
    cuts = _cuts(sizes, rooms)
    if cuts is None:
        raise _does_not_fit(problem, nodes, sum(sizes))
    runs = zip(nodes, pairwise(cuts), strict=True)
    visits = tuple(Visit(node.name, start, stop) for node, (start, stop) in runs if start < stop)
    return Plan(n_layers=problem.model.n_layers, head=problem.head, visits=visits, solver="even")


def _cuts(sizes: list[int], rooms: list[int]) -> list[int] | None:
    """Where the nodes' runs begin and end, n_nodes + 1 layer numbers; None when it does not fit. Exact in integers."""
    ends = [0, *accumulate(sizes)]  # ends[i]: bytes of the first i layers
    earliest = _earliest_cuts(ends, rooms)
    if earliest[0] > 0 or rooms[0] < 0:
        return None
    rooms = [max(room, 0) for room in rooms]
    shares = [0, *accumulate(rooms)]
    cuts = [0]
    for node, room in enumerate(rooms):
        wanted = _nearest(ends, shares[node + 1], shares[-1])
        latest = max(cut for cut in range(cuts[-1], len(ends)) if ends[cut] - ends[cuts[-1]] <= room)
        cuts.append(max(earliest[node + 1], min(wanted, latest)))
    return cuts


def _earliest_cuts(ends: list[int], rooms: list[int]) -> list[int]:
    """The smallest cuts from which the nodes behind can still take all the rest, each as much as fits."""
    cuts = [len(ends) - 1]
    for room in reversed(rooms):
        cuts.append(next(cut for cut in range(cuts[-1] + 1) if ends[cuts[-1]] - ends[cut] <= max(room, 0)))
    return cuts[::-1]


def _nearest(ends: list[int], share: int, total: int) -> int:
    """The border between layers that is nearest to share / total of all bytes, the earlier one of two."""
    return min(range(len(ends)), key=lambda cut: abs(ends[cut] * total - ends[-1] * share))


def _does_not_fit(problem: Problem, nodes: tuple[NodeFacts, ...], layers_bytes: int) -> PlanError:
    fixed = problem.fixed_bytes(problem.head)
    have = ", ".join(f"{node.name} {_gb(node.memory_bytes)}" for node in nodes)
    return PlanError(
        f"{problem.model.name} does not fit: its layers with {problem.kv_tokens} KV positions need"
        f" {_gb(layers_bytes)}, and input and output part {_gb(fixed)} on {problem.head}; the nodes may use: {have}",
        hint="add a node, use a smaller model or a shorter context (-c)",
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"
