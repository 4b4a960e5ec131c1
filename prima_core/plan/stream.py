"""What of a node's weights stays in memory, what is read from disk in every pass, and the buffer between. Exact.

Weights that fit all stay. Else the node keeps what its memory holds beside KV, a buffer of B bytes and the activations
that it gathers, and reads X + B bytes in every pass, X being what its memory lacks. How large B is best is told by
`overlap.py` where all rates are known. Where a device with a memory of its own streams, the host's holds the buffer and
what it has room for of the weights that pass: X is what both lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from prima_core.memory.residency import BLOCK_BYTES, spread
from prima_core.plan.plan import Plan, Residency
from prima_core.plan.problem import DeviceFacts, NodeFacts, Problem
from prima_core.plan.slots import Passing, Slots, slots_of

LEAST_BUFFER_BYTES = 32 << 20
"""Several reads of some MiB in flight, and as much again in use: with less a disk does not reach its rate."""
ALIGNING_BYTES = 2 * 4096
"""Direct reads are of whole blocks of the disk, so that each tensor takes up to two blocks more."""
GATHER_BYTES = 32 << 20
GATHER_SHARE = 32
"""Activations of a prompt for one reading of the weights: at most so many bytes, and this part of a node's memory. Of
common models some hundred tokens, which take about as long to compute as the weights to read. More would be taken from
weights that could stay, and so slow down every token."""
_SLOT_TRIES = 16


@dataclass(frozen=True)
class Overload:
    """A node's device whose weights have `room_bytes`, slots counted, which is less than they take.

    `layer_bytes`: of each layer there. `table_bytes`: an embedding of which only rows are looked up: it is left on disk
    first, at no cost. `output_bytes`: the other ends, the last to be streamed. `reads_alone`: no other node of the plan
    is on its disk. `slots`: of a device that copies. `host_room_bytes`: for the buffer and for what passes, where the
    device has its own memory; None: the buffer takes from `room_bytes`.
    """

    node: str
    device: str
    layer_bytes: tuple[int, ...]
    expert_bytes: int
    n_visits: int
    table_bytes: int
    output_bytes: int
    room_bytes: int
    largest_tensor_bytes: int
    routed_bytes: int
    tensor_bytes: tuple[tuple[int, ...], ...] = ()
    reads_alone: bool = False
    slots: Slots | None = None
    host_room_bytes: int | None = None

    @property
    def is_beside(self) -> bool:
        """Whether its buffer is in another memory than its weights."""
        return self.host_room_bytes is not None

    @property
    def lacking_bytes(self) -> int:
        """Of weights, before anything else has a place."""
        return max(0, sum(self.layer_bytes) + self.output_bytes - self.room_bytes)

    @cached_property
    def over_bytes(self) -> int:
        """What must be streamed before there is a buffer."""
        return self._beside_slots(self.lacking_bytes)

    @cached_property
    def disk_over_bytes(self) -> int:
        """What of it must be read in every pass (X): its host has no room for it either."""
        return max(0, self.over_bytes - (self.host_room_bytes or 0))

    def host_bytes(self, streamed_bytes: int, buffer_bytes: int) -> int:
        """Of so many bytes that are streamed (with the table), those that stay in the host's memory."""
        if self.host_room_bytes is None:
            return 0
        return max(0, min(streamed_bytes, self.host_room_bytes - buffer_bytes))

    def streamed(self, buffer_bytes: int) -> int:
        """Of all weights there but the table. A buffer in the device's own memory takes from what stays."""
        if self.slots is None:
            return self.over_bytes + buffer_bytes
        taken = buffer_bytes if self.host_room_bytes is None else 0
        return self._beside_slots(self.lacking_bytes + taken) if self.lacking_bytes else 0

    def passing(self, streamed_bytes: int) -> Passing:
        """When so many bytes are streamed (without the table)."""
        if self.slots is None or streamed_bytes <= 0:
            return Passing(max(0, streamed_bytes), 0)
        of_output = min(self.output_bytes, max(0, streamed_bytes - self.expert_bytes - self._dense_bytes))
        piece = min(self.slots.piece_bytes, self.output_bytes) if of_output else 0
        if not self.slots.layers:
            return Passing(streamed_bytes, self._about_in_slots(streamed_bytes) + piece)
        kept_experts = max(0, self.expert_bytes - streamed_bytes)  # in the host's memory, as in the file
        chosen = self.slots.passing(self._chosen(streamed_bytes))
        return Passing(chosen.freed_bytes - kept_experts + of_output, chosen.slot_bytes + piece)

    def _about_in_slots(self, streamed_bytes: int) -> int:
        """Where tensors are not known one by one."""
        whole = max(self.layer_bytes, default=0)
        if self.slots is None or self.expert_bytes:
            return whole
        return min(whole, self.slots.grown(self._share(streamed_bytes) + self.largest_tensor_bytes))

    def _beside_slots(self, lacking_bytes: int) -> int:
        """The least to stream so that so much memory is left besides the slots for it: as more is streamed, other
        tensors may be chosen, whose slots are larger."""
        if self.slots is None or not lacking_bytes:
            return lacking_bytes
        total = 0
        for trial in range(_SLOT_TRIES):
            short = lacking_bytes - self.passing(total).gained_bytes
            if short <= 0:
                return total
            is_near = trial >= _SLOT_TRIES // 2 or not self.slots.layers
            total = self.in_whole(total + math.ceil(short / (1.0 if is_near else self.slots.growth)))
        return self._streamable_bytes

    def in_whole(self, streamed_bytes: int) -> int:
        """What of experts, or of the output, does not go to a device's own memory would be kept in the host's: there it
        is all or nothing."""
        if self.host_room_bytes is None:
            return streamed_bytes
        streamed_bytes = max(streamed_bytes, self.expert_bytes)
        before = self.expert_bytes + self._dense_bytes
        return before + self.output_bytes if self.output_bytes and streamed_bytes > before else streamed_bytes

    @property
    def experts_over_bytes(self) -> int:
        """The part of X that is experts: these are streamed first, and only the chosen ones are read."""
        return min(self.disk_over_bytes, self.expert_bytes)

    @property
    def dense_over_bytes(self) -> int:
        """The part of X that can be read ahead."""
        return self.disk_over_bytes - self.experts_over_bytes

    @property
    def spare_bytes(self) -> int:
        """So large a buffer makes nothing be read ahead yet: only experts give way to it, or nothing at all."""
        return max(0, self.expert_bytes + (self.host_room_bytes or 0) - self.over_bytes)

    def least_buffer(self, streamed_bytes: int) -> int:
        """Room for a layer in use and the next one, when so many bytes are streamed (without the table)."""
        if self.tensor_bytes:
            return max(LEAST_BUFFER_BYTES, self.tight_buffer(streamed_bytes))
        next_too = 2 * self._share(streamed_bytes) + self.largest_tensor_bytes
        return max(LEAST_BUFFER_BYTES, self.tight_buffer(streamed_bytes), next_too)

    def tight_buffer(self, streamed_bytes: int) -> int:
        """With less a layer may not come through: its share in whole tensors, and what is left unused at the ring's
        end, as a tensor lies in one piece. Nor a block of the output matrix."""
        of_output = streamed_bytes > self.expert_bytes + self._dense_bytes
        block = min(self.output_bytes, BLOCK_BYTES) + ALIGNING_BYTES if of_output else 0
        share = self._share(streamed_bytes)
        if not share:
            return block
        if self.tensor_bytes:
            return max(block, self._layer_in_whole_tensors(streamed_bytes) + self.routed_bytes)
        return max(block, min(max(self.layer_bytes), share + self.largest_tensor_bytes) + self.largest_tensor_bytes)

    def _layer_in_whole_tensors(self, streamed_bytes: int) -> int:
        """The most that a layer and its largest tensor take when the store has chosen which tensors these are."""
        chosen = [
            [sizes[index] for index in own]
            for sizes, own in zip(self.tensor_bytes, self._chosen(streamed_bytes), strict=True)
            if own
        ]
        totals = (sum(sizes) + max(sizes) + (len(sizes) + 1) * ALIGNING_BYTES for sizes in chosen)
        return max(totals, default=0)

    def _chosen(self, streamed_bytes: int) -> list[list[int]]:
        """Of each layer's `tensor_bytes`, which are streamed: as `memory.residency` chooses by name, and they are in
        the order of their names."""
        layers = [{f"{index:02}": size for index, size in enumerate(sizes)} for sizes in self.tensor_bytes]
        wanted = min(streamed_bytes - self.expert_bytes, self._dense_bytes)
        return [sorted(map(int, names)) for names in spread(layers, max(0, wanted))]

    @cached_property
    def _dense_bytes(self) -> int:
        """Of the layers, in the file, what can be streamed apart from experts."""
        if self.tensor_bytes:
            return sum(map(sum, self.tensor_bytes))
        return sum(self.layer_bytes) - self.expert_bytes

    def _share(self, streamed_bytes: int) -> int:
        """Of a layer: an even share of what is not experts, and the experts that a token is routed to."""
        if not self.layer_bytes or not streamed_bytes:
            return 0
        dense = max(0, streamed_bytes - self.expert_bytes)
        return min(max(self.layer_bytes), -(-dense // len(self.layer_bytes)) + self.routed_bytes)

    @cached_property
    def smallest_buffer(self) -> int:
        """The least with which X + B are streamed: a larger buffer makes more weights stream, and these want more."""
        return self._buffer_with(0)

    @cached_property
    def fluent_buffer(self) -> int:
        """The least with which a disk of the node's own hardly pauses: as tensors lie in one piece, one may have to
        wait for room at the ring's begin while there is some at its end (8B in Q4_K_M: 5 % of the time). Of a disk
        that is shared others use the pause."""
        if not (self.reads_alone and self.tensor_bytes and self.dense_over_bytes):
            return self.smallest_buffer
        size = self._buffer_with(max(max(sizes, default=0) for sizes in self.tensor_bytes))
        return size if size <= self.most_buffer else self.smallest_buffer

    def _buffer_with(self, spare_bytes: int) -> int:
        size = LEAST_BUFFER_BYTES
        while (need := self.least_buffer(self.streamed(size)) + spare_bytes) > size:
            size = need
        return size

    def guessed_buffer(self) -> int:
        """Where no rates are known: enough to hide about half, so that not much more is read than must be."""
        return 0 if self.n_visits == 1 else self.dense_over_bytes // (2 * self.n_visits)

    @cached_property
    def most_buffer(self) -> int:
        """With more there is no room for it, or not for the slots."""
        if self.host_room_bytes is not None:
            return self.host_room_bytes
        return max(0, self.room_bytes - self.passing(self._streamable_bytes).slot_bytes)

    @property
    def is_possible(self) -> bool:
        size = self.smallest_buffer
        if size > (self.host_room_bytes if self.host_room_bytes is not None else self.room_bytes):
            return False
        streamed, taken = self.streamed(size), 0 if self.is_beside else size
        return self.slots is None or (
            streamed <= self._streamable_bytes and self.passing(streamed).gained_bytes >= self.lacking_bytes + taken
        )

    @property
    def least_room_bytes(self) -> int:
        """With less room the node cannot take these layers at all; with a memory of its own, the device."""
        everything = self._streamable_bytes
        buffer_bytes = 0 if self.is_beside else self.least_buffer(everything)
        weights = sum(self.layer_bytes) + self.output_bytes
        return min(weights, buffer_bytes + weights - self.passing(everything).gained_bytes)

    @property
    def _streamable_bytes(self) -> int:
        if self.slots is None:
            return sum(self.layer_bytes) + self.output_bytes
        return self.expert_bytes + self._dense_bytes + self.output_bytes

    def streamed_bytes(self, buffer_bytes: int) -> int:
        """Of all weights there, the table counted."""
        return self.streamed(buffer_bytes) + self.table_bytes


def gather_bytes(problem: Problem, names: Iterable[str]) -> int:
    """Activations of a prompt that each of these nodes, which stream, may collect."""
    return min([GATHER_BYTES, *(problem.node(name).memory_bytes // GATHER_SHARE for name in names)])


def overload_of(
    plan: Plan, problem: Problem, needs: Sequence[Residency], device: DeviceFacts, gather_bytes: int
) -> Overload:
    """What a node of a plan has to stream on this device, where `needs` are all that it would take."""
    node = problem.node(needs[0].node)
    layers = layers_on(plan, node, device.id)
    kv = sum(need.kv_bytes for need in needs if need.device == device.id)
    sharing = {place.id for place in node.places if place.shares_host and place.id != device.id}
    taken = sum(other.weight_bytes + other.kv_bytes for other in needs if other.device in sharing)
    host = node.memory_bytes - taken - gather_bytes
    room = (min(device.memory_bytes - gather_bytes, host) if device.shares_host else device.memory_bytes) - kv
    sizes, model = problem.weight_bytes(device), problem.model
    ends = problem.fixed_bytes_on(node.name, device.id)
    table = min(ends, problem.table_bytes(node.name))
    experts = [model.expert_bytes[layer] for layer in layers] if model.expert_bytes else []
    return Overload(
        node=node.name,
        device=device.id,
        layer_bytes=tuple(sizes[layer] for layer in layers),
        expert_bytes=sum(experts),
        n_visits=n_turns(plan, node.name),
        table_bytes=table,
        output_bytes=ends - table,
        room_bytes=room,
        largest_tensor_bytes=model.largest_tensor_bytes or max((sizes[layer] for layer in layers), default=0),
        tensor_bytes=tuple(model.tensor_bytes[layer] for layer in layers) if model.tensor_bytes else (),
        routed_bytes=max(experts, default=0) * model.n_experts_used // max(1, model.n_experts),
        reads_alone=not node.disk or [problem.node(name).disk for name in plan.nodes].count(node.disk) == 1,
        slots=slots_of(model, device, layers) if device.copies else None,
        host_room_bytes=None if device.shares_host else max(0, host),
    )


def layers_on(plan: Plan, node: NodeFacts, device: str) -> list[int]:
    """The layers of a node that one of its devices computes, in the order of the visits."""
    visits = (visit for visit in plan.visits if visit.node == node.name)
    parts = (part for visit in visits for part in visit.parts(node.places[0].id) if part.device == device)
    return [layer for part in parts for layer in part.layers]


def n_turns(plan: Plan, node: str) -> int:
    """How many times in a pass the node begins to compute after another one; a node alone has one long turn."""
    names = [visit.node for visit in plan.visits]
    return max(1, sum(name == node != names[index - 1] for index, name in enumerate(names)))
