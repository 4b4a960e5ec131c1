"""What a node holds while it serves an epoch: its part of the model, opened as the plan says, and links to others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from prima_core.engine.scheduler import Wanted
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Backend, Device, Layers, SendLink, Shard, Slice, Store
from prima_core.memory.governor import Governor, HostPart
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import System
from prima_core.model.weights import Model, end_tensors
from prima_core.plan.plan import Plan
from prima_core.ring import wire
from prima_core.ring.gather import row_bytes
from prima_core.ring.loading import LoadingStore, NodeStore, Tell
from prima_core.ring.reports import Assignment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node's store is opened for: see `memory.store.StreamingStore`."""

    visits: tuple[Layers, ...]
    ends: tuple[str, ...]
    streamed_bytes: int
    buffer_bytes: int
    host_bytes: int | None = None


OpenStore = Callable[[Model, Holding, System], NodeStore]


def open_store(model: Model, holding: Holding, system: System) -> NodeStore:
    """The store of a node, whether it streams or not: one that does not may have to begin when memory gets short."""
    sizes = holding.streamed_bytes, holding.buffer_bytes
    return StreamingStore(model.file, model.spec, holding.visits, holding.ends, *sizes, system, holding.host_bytes)


@dataclass(slots=True)
class Serving:
    """What is loaded now. `wanted` and `newest` are the only things that change from step to step."""

    assignment: Assignment
    first_device: str
    store: NodeStore
    shards: Mapping[str, Shard]
    links: Mapping[str, SendLink]
    limits: wire.FrameLimits
    first_visit: int | None  # of this node in the plan
    max_gather: int  # rows; 0: weights stay in memory, so that steps are best run as they come
    load_s: float
    exits: ExitStack
    wanted: dict[int, tuple[Wanted, ...]] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)  # per visit: the last step number seen

    @property
    def input_shard(self) -> Shard:
        """The shard with the input part, on the head."""
        return self.shards[self.assignment.plan.end_device or self.first_device]

    @property
    def output_shard(self) -> Shard:
        """The shard with the output part, on the node that has it."""
        plan = self.assignment.plan
        return self.shards[plan.device_of_output or self.first_device]

    def take_wanted(self, number: int) -> tuple[Wanted, ...]:
        """What is wanted of a step that has come back. Those before it that have not were lost on their way."""
        wanted = self.wanted.pop(number, ())
        for lost in [other for other in self.wanted if other < number]:
            del self.wanted[lost]
        return wanted


@dataclass(frozen=True, slots=True)
class Means:
    """What a node opens its part with."""

    backend: Backend
    open_store: OpenStore
    dial: Callable[[str], SendLink]
    system: System


def open_serving(name: str, assignment: Assignment, means: Means, tell: Tell, exits: ExitStack) -> Serving:
    """Load the part of node `name`. What is opened is closed by `exits`, also that of a load that fails: links, then
    the governor, shards, and the store with its threads; the model stays the caller's.

    Raises PrimaError kinds, DeviceMemoryError with the device; whatever `tell` raises.
    """
    plan, model, devices = assignment.plan, assignment.find_model(), means.backend.devices()
    first_device = devices[0].id
    slices = slices_of(plan, name, first_device)
    holding = holding_of(plan, name, model, devices)
    store = means.open_store(model, holding, means.system)
    exits.callback(store.close)
    loading = LoadingStore(store, model.spec, tuple(slices.values()), tell, means.system)
    shards = _load_shards(means.backend, model, slices, loading, exits)
    store.start()
    exits.callback(_govern(name, store, holding, means.system).close)
    links: dict[str, SendLink] = {}
    for node in plan.successors(name):
        links[node] = means.dial(assignment.addresses[node])
        exits.callback(links[node].close)
    return Serving(
        assignment,
        first_device,
        store,
        shards,
        links,
        _limits(assignment, model),
        next((index for index, visit in enumerate(plan.visits) if visit.node == name), None),
        plan.gather_bytes // row_bytes(model.spec) if holding.buffer_bytes else 0,
        loading.disk_s,
        exits,
    )


def _limits(assignment: Assignment, model: Model) -> wire.FrameLimits:
    plan, spec = assignment.plan, model.spec
    vocab_size = spec.vocab_size if plan.output_node != plan.head else 0
    return wire.FrameLimits(assignment.epoch, spec.d_model, len(plan.visits), plan.kv_tokens, vocab_size=vocab_size)


def _govern(name: str, store: NodeStore, holding: Holding, system: System) -> Governor:
    """The host gains memory when less of its own is pinned; what a device has in its own stays there."""
    pinning = store if holding.host_bytes is None else HostPart(store)
    governor = Governor(pinning, system, pinning.pinned_bytes)
    if holding.buffer_bytes and not governor.planned_bytes:
        text = "node %s keeps no weights in the host's memory: when others need some, it has only a buffer of %.2f GB"
        log.info(text, name, holding.buffer_bytes / 1e9)
    governor.start()
    return governor


def _load_shards(
    backend: Backend, model: Model, slices: Mapping[str, Slice], store: Store, exits: ExitStack
) -> dict[str, Shard]:
    shards: dict[str, Shard] = {}
    for device, part in slices.items():
        try:
            shards[device] = backend.load(model.spec, device, part, store)
        except DeviceMemoryError as error:
            error.device = device
            raise
        exits.callback(shards[device].close)
    return shards


def slices_of(plan: Plan, node: str, first_device: str) -> dict[str, Slice]:
    """The part of each of the node's devices that has one."""
    of_input = (plan.end_device or first_device) if plan.head == node else None
    of_output = (plan.device_of_output or first_device) if plan.output_node == node else None
    layers: dict[str, list[Layers]] = {device: [] for device in (of_input, of_output) if device is not None}
    for visit in plan.visits:
        if visit.node == node:
            for part in visit.parts(first_device):
                layers.setdefault(part.device, []).append(part.layers)
    slices: dict[str, Slice] = {}
    for device, ranges in layers.items():
        has_ends = device == of_input, device == of_output
        slices[device] = Slice(tuple(ranges), *has_ends, plan.kv_type, plan.context, plan.kv_tokens)
    return slices


def holding_of(plan: Plan, node: str, model: Model, devices: Sequence[Device]) -> Holding:
    """What the host's memory holds or passes on: all but what devices with memory of their own keep there, and, where
    weights are streamed, other devices that copy: of theirs the plan streams nothing."""
    needs = [need for need in plan.residency if need.node == node]
    streaming = {need.device for need in needs if need.streamed_bytes}
    of_host = streaming | {device.id for device in devices if device.shares_host and not (device.copies and streaming)}
    first_device = devices[0].id
    visits = [
        part.layers
        for visit in plan.visits
        if visit.node == node
        for part in visit.parts(first_device)
        if part.device in of_host
    ]
    ends = [
        name
        for device, part in slices_of(plan, node, first_device).items()
        if device in of_host
        for name in end_tensors(model.spec, part)
    ]
    return Holding(
        tuple(visits),
        tuple(ends),
        sum(need.streamed_bytes for need in needs),
        sum(need.buffer_bytes for need in needs),
        sum(need.host_bytes for need in needs) if _is_beside(streaming, devices) else None,
    )


def _is_beside(streaming: set[str], devices: Sequence[Device]) -> bool:
    """Whether what is streamed goes to a device with a memory of its own: there is no more than one that streams."""
    return any(device.id in streaming and not device.shares_host for device in devices)
