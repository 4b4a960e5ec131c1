"""Changes of a cluster that could make a difference to a plan: each a problem that differs in one thing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from prima_core.plan.explanation import Change
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan, Residency
from prima_core.plan.problem import LinkFacts, NodeFacts, Problem

MORE_BYTES = 10**9
FASTER_DISK = 2.0
CABLE = LinkFacts(latency_s=0.0003, bytes_s=125e6)
"""1 Gbit/s, through a switch and two operating systems."""
_SLOW = 2.0
"""A link is worth a cable that takes so many times as long as one."""


@dataclass(frozen=True, slots=True)
class Changed:
    """`problem`, after `change` at `node`."""

    change: Change
    node: str
    problem: Problem


def changes(plan: Plan, forecast: Forecast, problem: Problem) -> list[list[Changed]]:
    """Of a completed plan: a list for each kind, what promises most first."""
    stall_s = {node.node: node.stall_s for node in forecast.nodes}
    nodes = sorted(problem.nodes, key=lambda node: -stall_s.get(node.name, -1.0))
    full = [node for node in nodes if _is_full(plan, problem, node)]
    streaming = [node for node in nodes if _reads(plan, node)]
    used = sorted(plan.nodes[1:], key=lambda name: sum(map(len, plan.layers_of(name))))
    return [
        [Changed("memory", node.name, _with_memory(problem, node)) for node in full],
        _cables(plan, problem),
        _disks(problem, streaming),
        [Changed("without", name, _without(problem, name)) for name in used],
    ]


def _needs(plan: Plan, name: str) -> Iterator[Residency]:
    return (need for need in plan.residency if need.node == name)


def _reads(plan: Plan, node: NodeFacts) -> bool:
    return any(need.buffer_bytes and need.disk_bytes for need in _needs(plan, node.name))


def _is_full(plan: Plan, problem: Problem, node: NodeFacts) -> bool:
    """Whether it has no room for one layer more where layers could be streamed, in its host's memory."""
    sharing = {place.id: place.memory_bytes for place in node.places if place.shares_host}
    if not sharing:
        return _reads(plan, node)
    needs = list(_needs(plan, node.name))
    taken = sum(need.pinned_bytes + need.slot_bytes + need.kv_bytes for need in needs if need.device in sharing)
    taken += sum(need.buffer_bytes for need in needs)
    layer = max(problem.layers_bytes(index, index + 1) for index in range(problem.model.n_layers))
    return min(node.memory_bytes, sum(sharing.values())) - taken < layer


def _with_memory(problem: Problem, small: NodeFacts) -> Problem:
    nodes = tuple(_larger(node) if node is small else node for node in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes)


def _larger(node: NodeFacts) -> NodeFacts:
    """Devices that share the host's memory may take as much more of it."""
    devices = (
        msgspec.structs.replace(device, memory_bytes=device.memory_bytes + MORE_BYTES) if device.shares_host else device
        for device in node.devices
    )
    return msgspec.structs.replace(node, memory_bytes=node.memory_bytes + MORE_BYTES, devices=tuple(devices))


def _disks(problem: Problem, streaming: Sequence[NodeFacts]) -> list[Changed]:
    """Once for each disk."""
    first = {node.disk or f"\0{node.name}": node for node in reversed(streaming)}
    return [Changed("disk", node.name, _with_disk(problem, node)) for node in streaming if node in first.values()]


def _with_disk(problem: Problem, slow: NodeFacts) -> Problem:
    nodes = tuple(
        msgspec.structs.replace(
            node, disk_bytes_s=FASTER_DISK * node.disk_bytes_s, random_bytes_s=FASTER_DISK * node.random_bytes_s
        )
        if node is slow or (node.disk and node.disk == slow.disk)
        else node
        for node in problem.nodes
    )
    return msgspec.structs.replace(problem, nodes=nodes)


def _without(problem: Problem, name: str) -> Problem:
    nodes = tuple(node for node in problem.nodes if node.name != name)
    links = tuple(link for link in problem.links if name not in (link.source, link.target))
    return msgspec.structs.replace(problem, nodes=nodes, links=links)


# ---------------------------------------------------------------- cables

Pair = tuple[str, str]


def _cables(plan: Plan, problem: Problem) -> list[Changed]:
    """Of every node, what saves most on the plan's way first. Of two nodes with the same slow links the one that is not
    the head."""
    ways = list(pairwise((plan.head, *plan.stops)))
    slow: dict[frozenset[Pair], str] = {}
    for node in sorted(problem.nodes, key=lambda node: node.name == problem.head):
        slow.setdefault(_slow_links(problem, node.name), node.name)
    saved_s = {name: sum(_saved_s(problem, way) for way in ways if way in pairs) for pairs, name in slow.items()}
    found = [(name, pairs) for pairs, name in slow.items() if pairs]
    found.sort(key=lambda item: -saved_s[item[0]])
    return [Changed("cable", name, _with_cable(problem, pairs)) for name, pairs in found]


def _slow_links(problem: Problem, name: str) -> frozenset[Pair]:
    """All links of a node, if all are slow: one that is quick to somebody has its cable, and others lack theirs."""
    others = [node.name for node in problem.nodes if node.name != name]
    pairs = [pair for other in others for pair in ((name, other), (other, name))]
    n_bytes = problem.model.activation_bytes
    quick_s = _SLOW * CABLE.time_s(n_bytes)
    return frozenset(pairs if all(problem.link(*pair).time_s(n_bytes) > quick_s for pair in pairs) else ())


def _saved_s(problem: Problem, way: Pair) -> float:
    n_bytes = problem.model.activation_bytes
    return problem.link(*way).time_s(n_bytes) - CABLE.time_s(n_bytes)


def _with_cable(problem: Problem, pairs: frozenset[Pair]) -> Problem:
    """The first link that fits counts."""
    cables = (msgspec.structs.replace(CABLE, source=source, target=target) for source, target in sorted(pairs))
    return msgspec.structs.replace(problem, links=(*cables, *problem.links))
