"""A pass through the plan's visits as it happens: nodes compute in turn while the readers of all of them go on.

Reading is a flow: a node's reader fills its buffer in the order in which the node uses its layers, again and again,
while there is room; a layer begins when all its streamed bytes are there, and leaves the buffer when it is computed.
Readers on one disk that are busy at the same time share its rate. Passes follow each other, as one token follows
another, until they take the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prima_core.errors import PlanError
from prima_core.plan.costs import LayerCost, PassCost, demand_bytes_s
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem

_MOST_PASSES = 128
_COUNTED = 64
"""Passes whose mean counts where they do not become all the same."""
_SAME = 1e-7
_EPSILON_BYTES = 1e-3
_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class Disk:
    """How a node reads: nodes with the same `name` share a disk; "": its own. `demand_bytes_s`: experts; 0: as all."""

    bytes_s: float
    buffer_bytes: int
    name: str = ""
    demand_bytes_s: float = 0.0

    def demanded_s(self, n_bytes: float) -> float:
        return n_bytes / (self.demand_bytes_s or self.bytes_s)


@dataclass(frozen=True, slots=True)
class Simulated:
    """A pass in the long run. By node: seconds in which it waits for its disk, and bytes that it reads."""

    pass_s: float
    stall_s: Mapping[str, float]
    read_bytes: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Span:
    """What a node does from `start_s` to `stop_s` of a pass: "link" (activations are on the way to it), "stall" (it
    waits for its disk), "compute", or, beside one of these, "read"."""

    node: str
    kind: Literal["link", "stall", "compute", "read"]
    start_s: float
    stop_s: float


def disks_of(plan: Plan, problem: Problem) -> dict[str, Disk]:
    """Of a completed plan's nodes that read."""
    sizes: dict[str, int] = {}
    for need in plan.residency:
        if need.buffer_bytes and need.disk_bytes:
            sizes[need.node] = sizes.get(need.node, 0) + need.buffer_bytes
    nodes = {name: problem.node(name) for name in sizes}
    return {
        name: Disk(node.disk_bytes_s, sizes[name], node.disk, demand_bytes_s(node, problem.model))
        for name, node in nodes.items()
    }


def simulate(cost: PassCost, disks: Mapping[str, Disk]) -> Simulated:
    """`disks`: of the nodes that stream, with buffers that a layer fits."""
    return _in_the_long_run(cost, _Flow(disks))


def spans_of(cost: PassCost, disks: Mapping[str, Disk]) -> list[Span]:
    """What happens in a pass in the long run, from 0 on: a span for each way, layer, wait and time of reading."""
    flow = _Flow(disks)
    _in_the_long_run(cost, flow)
    began_s, spans = flow.now_s, flow.record()
    _one_pass(cost, flow)
    return [Span(span.node, span.kind, span.start_s - began_s, span.stop_s - began_s) for span in spans]


def _in_the_long_run(cost: PassCost, flow: _Flow) -> Simulated:
    used = {name: cost.streamed_bytes(name) + cost.demanded_bytes(name) for name in flow.disks}
    passes = [_one_pass(cost, flow)]
    while len(passes) < _MOST_PASSES:
        passes.append(_one_pass(cost, flow))
        if _are_near(passes[-2].pass_s, passes[-1].pass_s) and all(
            _are_near(n_bytes, passes[-1].read_bytes[name]) for name, n_bytes in used.items()
        ):  # at first buffers fill up, also behind the back of passes that do not take longer for it
            return passes[-1]
    return _mean(passes[-_COUNTED:])


def _are_near(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(one, other)


def _one_pass(cost: PassCost, flow: _Flow) -> Simulated:
    began_s, read = flow.now_s, {name: reader.read for name, reader in flow.readers.items()}
    stall_s = dict.fromkeys(flow.readers, 0.0)
    for visit in cost.visits:
        flow.now_s += visit.hop_s
        if flow.spans is not None:
            flow.spans.append(Span(visit.node, "link", flow.now_s - visit.hop_s, flow.now_s))
        for layer in visit.layers:
            waiting_s = _one_layer(layer, visit.node, flow)
            if waiting_s:
                stall_s[visit.node] += waiting_s
            if flow.spans is not None:
                ready_s = flow.now_s - layer.compute_s
                flow.spans.append(Span(visit.node, "stall", ready_s - waiting_s, ready_s))
                flow.spans.append(Span(visit.node, "compute", ready_s, flow.now_s))
    flow.catch_up()
    read = {name: reader.read - read[name] for name, reader in flow.readers.items()}
    return Simulated(flow.now_s - began_s, stall_s, read)


def _one_layer(layer: LayerCost, node: str, flow: _Flow) -> float:
    """How long the node waited for it."""
    began_s, reader = flow.now_s, flow.readers.get(node)
    if reader is None or not (layer.streamed_bytes or layer.demanded_bytes):
        flow.now_s += layer.compute_s
        return 0.0
    disk = flow.disks[node]
    disk.go_on(began_s)
    if layer.streamed_bytes:
        disk.read_to(reader, reader.freed + layer.streamed_bytes)
    if layer.demanded_bytes:
        disk.demand(reader, layer.demanded_bytes)
    flow.now_s = disk.now_s + layer.compute_s
    waited_s = disk.now_s - began_s
    disk.go_on(flow.now_s)
    reader.freed += layer.streamed_bytes
    return waited_s


def _mean(passes: Sequence[Simulated]) -> Simulated:
    n = len(passes)
    return Simulated(
        sum(one.pass_s for one in passes) / n,
        {name: sum(one.stall_s[name] for one in passes) / n for name in passes[0].stall_s},
        {name: sum(one.read_bytes[name] for one in passes) / n for name in passes[0].read_bytes},
    )


@dataclass(slots=True)
class _Reader:
    """Bytes since the start: `ahead` into the buffer, `freed` out of it, `read` with those on demand."""

    node: str
    disk: Disk
    buffer_bytes: float
    ahead: float = 0.0
    freed: float = 0.0
    read: float = 0.0
    demanded: float = 0.0

    @property
    def bytes_s(self) -> float:
        """Of what it reads next."""
        return (self.demanded and self.disk.demand_bytes_s) or self.disk.bytes_s

    @property
    def wants(self) -> float:
        """What it reads next without a change: what is demanded goes before what is ahead of its use."""
        return self.demanded or self.buffer_bytes - (self.ahead - self.freed)

    def take(self, n_bytes: float) -> None:
        self.read += n_bytes
        if self.demanded:
            self.demanded = 0.0 if self.demanded - n_bytes < _EPSILON_BYTES else self.demanded - n_bytes
        else:
            self.ahead += n_bytes


class _Flow:
    """The readers of all nodes. Their disks know nothing of each other, so each is taken along to the present only
    when one of its nodes computes a layer that was read, and at the end of a pass."""

    def __init__(self, disks: Mapping[str, Disk]) -> None:
        self.now_s = 0.0
        self.spans: list[Span] | None = None
        self.readers = {node: _Reader(node, disk, disk.buffer_bytes) for node, disk in disks.items()}
        shared: dict[str, _DiskFlow] = {}
        self.disks = {node: shared.setdefault(disk.name or f"\0{node}", _DiskFlow()) for node, disk in disks.items()}
        for node, reader in self.readers.items():
            self.disks[node].readers.append(reader)

    def record(self) -> list[Span]:
        """What happens from now on."""
        self.spans = []
        for disk in self.disks.values():
            disk.spans = self.spans
        return self.spans

    def catch_up(self) -> None:
        for disk in self.disks.values():
            disk.go_on(self.now_s)


@dataclass(slots=True)
class _DiskFlow:
    """The readers of one disk in one time."""

    readers: list[_Reader] = field(default_factory=list)
    now_s: float = 0.0
    spans: list[Span] | None = None

    def go_on(self, until_s: float) -> None:
        while self.now_s < until_s:
            self._step(until_s)

    def read_to(self, reader: _Reader, ahead: float) -> None:
        """Until so many bytes have come into its buffer."""
        while reader.ahead < ahead - _EPSILON_BYTES:
            self._step(until=(reader, ahead - reader.ahead))

    def demand(self, reader: _Reader, n_bytes: float) -> None:
        reader.demanded = n_bytes if n_bytes > _EPSILON_BYTES else 0.0
        while reader.demanded:
            self._step(until=(reader, reader.demanded))

    def _step(self, until_s: float = _EVER, until: tuple[_Reader, float] | None = None) -> None:
        """Go on to the next moment at which a reader stops, but not further than asked for."""
        busy = [(reader, wants) for reader in self.readers if (wants := reader.wants) > _EPSILON_BYTES]
        share, left_s = 1 / len(busy) if busy else 0.0, until_s - self.now_s
        step_s = left_s
        for reader, wants in busy:
            most = min(wants, until[1]) if until is not None and until[0] is reader else wants
            step_s = min(step_s, most / (reader.bytes_s * share))
        if step_s == _EVER:
            raise PlanError("a layer's streamed bytes are more than the buffer", hint="give the node a larger buffer")
        for reader, _ in busy:
            reader.take(reader.bytes_s * share * step_s)
        began_s = self.now_s
        self.now_s = until_s if step_s == left_s else self.now_s + step_s
        if self.spans is not None:
            self.spans.extend(Span(reader.node, "read", began_s, self.now_s) for reader, _ in busy)
