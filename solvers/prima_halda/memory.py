"""What a way to lay the layers on places takes: whether it can be, and which nodes stream. Counts as `complete` does,
but only what changes from way to way, and with a quick guess at the smallest buffer where that depends on single
tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from prima_core.plan.slots import slots_of
from prima_core.plan.stream import LEAST_BUFFER_BYTES, Overload, gather_bytes
from prima_halda.cluster import Cluster, Member

Way = tuple[int, ...]
"""A place, by number, for every layer."""
Layers = tuple[tuple[int, ...], ...]
"""Of a node, by place."""


@dataclass(frozen=True, slots=True)
class Load:
    """A node that streams these `layers`, but for its visits. `smallest`: about the smallest buffer."""

    overload: Overload
    smallest: int
    layers: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def streamed(self, buffer_bytes: float) -> float:
        """Without the table."""
        return self.overload.over_bytes + (0 if self.overload.is_beside else buffer_bytes)

    def read(self, buffer_bytes: float) -> float:
        """What of it the host does not keep."""
        return max(0.0, self.streamed(buffer_bytes) - max(0.0, (self.overload.host_room_bytes or 0) - buffer_bytes))


@dataclass(slots=True)
class Memory:
    cluster: Cluster
    _fits: dict[tuple[int, Layers], bool | None] = field(default_factory=dict)
    _lacking: dict[tuple[int, Layers], int] = field(default_factory=dict)
    _loads: dict[tuple[int, Layers, int], Load | None] = field(default_factory=dict)

    def loads(self, way: Way) -> dict[int, Load] | None:
        """Of the nodes that stream; None: some node cannot take what it would have to."""
        held: dict[int, Layers] = {}
        for index, layers in self._by_member(way).items():
            fits = self._fit(index, layers)
            if fits is None:
                return None
            if not fits:
                held[index] = layers
        gather = gather_bytes(self.cluster.problem, [self.cluster.members[index].name for index in held])
        loads = {index: self._load(index, layers, gather) for index, layers in held.items()}
        if any(load is None for load in loads.values()):
            return None
        return {index: load for index, load in loads.items() if load is not None and load.overload.over_bytes}

    def lacks(self, way: Way) -> dict[int, int]:
        """Bytes that must be added to memory of nodes before a way can be; empty where it can be already, or almost."""
        found = {index: self._lack(index, layers) for index, layers in self._by_member(way).items()}
        return {index: lack for index, lack in found.items() if lack}

    def _lack(self, index: int, layers: Layers) -> int:
        key = (index, layers)
        if key not in self._lacking:
            self._lacking[key] = self._lack_now(self.cluster.members[index], layers)
        return self._lacking[key]

    def _lack_now(self, member: Member, layers: Layers) -> int:
        totals = [
            sum(place.sizes[layer] for layer in own) + self.cluster.kv_bytes * len(own) + place.fixed_bytes
            for place, own in zip(member.places, layers, strict=True)
        ]
        lack = sum(
            max(0, total - place.memory_bytes)
            for place, total in zip(member.places, totals, strict=True)
            if place is not member.streaming
        )
        host = sum(total for place, total in zip(member.places, totals, strict=True) if place.shares_host)
        if member.streaming is None:
            return lack + max(0, host - member.memory_bytes)
        if self._fit(member.index, layers):
            return 0
        overload = self._overload(member, layers, gather_bytes(self.cluster.problem, [member.name]))
        if overload.over_bytes:
            lack += _lack_of(overload, self._smallest(overload))
        return lack

    def _by_member(self, way: Way) -> dict[int, Layers]:
        """The layers of every node that is visited, or has an end of the model."""
        by_place: dict[int, list[int]] = {}
        for layer, number in enumerate(way):
            if number in by_place:
                by_place[number].append(layer)
            else:
                by_place[number] = [layer]
        used = {self.cluster.places[number].member for number in by_place}
        used |= {self.cluster.head, self.cluster.output.member}
        return {
            index: tuple([tuple(by_place.get(place.number, ())) for place in self.cluster.members[index].places])
            for index in sorted(used)
        }

    def _fit(self, index: int, layers: Layers) -> bool | None:
        """Whether all stays in memory; None: it cannot be, streaming or not."""
        key = (index, layers)
        if key not in self._fits:
            self._fits[key] = self._fits_now(self.cluster.members[index], layers)
        return self._fits[key]

    def _fits_now(self, member: Member, layers: Layers) -> bool | None:
        host, fits = 0, True
        for place, own in zip(member.places, layers, strict=True):
            if not own and not place.fixed_bytes:
                continue
            total = sum(place.sizes[layer] for layer in own) + self.cluster.kv_bytes * len(own) + place.fixed_bytes
            host += total if place.shares_host else 0
            if total > place.memory_bytes:
                fits = False
                if place is not member.streaming:
                    return None
        if fits and host <= member.memory_bytes:
            return True
        return False if member.streaming is not None else None

    def _load(self, index: int, layers: Layers, gather: int) -> Load | None:
        key = (index, layers, gather)
        if key not in self._loads:
            member = self.cluster.members[index]
            overload = self._overload(member, layers, 0)
            if overload.over_bytes:
                overload = self._overload(member, layers, gather)
            self._loads[key] = self._load_of(overload, self._streaming_layers(member, layers))
        return self._loads[key]

    def _load_of(self, overload: Overload, layers: tuple[int, ...]) -> Load | None:
        if overload.room_bytes < 0:
            return None
        smallest = self._smallest(overload) if overload.over_bytes else 0
        return None if _lack_of(overload, smallest) else Load(overload, smallest, layers)

    def _overload(self, member: Member, layers: Layers, gather: int) -> Overload:
        """`room_bytes` is negative where not even KV fits."""
        cluster, place = self.cluster, member.streaming
        assert place is not None, "only who may stream is asked"
        own = self._streaming_layers(member, layers)
        taken = sum(
            sum(other.sizes[layer] for layer in held) + cluster.kv_bytes * len(held) + other.fixed_bytes
            for other, held in zip(member.places, layers, strict=True)
            if other.shares_host and other is not place
        )
        host = member.memory_bytes - taken - gather
        room = min(place.memory_bytes - gather, host) if place.shares_host else place.memory_bytes
        model, table = cluster.problem.model, place.table_bytes
        experts = [model.expert_bytes[layer] for layer in own] if model.expert_bytes else []
        return Overload(
            node=member.name,
            device=place.id,
            layer_bytes=tuple(place.sizes[layer] for layer in own),
            expert_bytes=sum(experts),
            n_visits=1,
            table_bytes=table,
            output_bytes=place.fixed_bytes - table,
            room_bytes=room - cluster.kv_bytes * len(own),
            largest_tensor_bytes=model.largest_tensor_bytes or max((place.sizes[layer] for layer in own), default=0),
            routed_bytes=max(experts, default=0) * model.n_experts_used // max(1, model.n_experts),
            reads_alone=self.cluster.reads_alone(member),
            slots=slots_of(model, place.device, ()) if place.device.copies else None,
            host_room_bytes=None if place.shares_host else max(0, host),
        )

    def _streaming_layers(self, member: Member, layers: Layers) -> tuple[int, ...]:
        return next((own for place, own in zip(member.places, layers, strict=True) if place is member.streaming), ())

    def _smallest(self, overload: Overload) -> int:
        """Of single tensors a layer's share can be chosen better than as a whole: how well is found out at the end."""
        if not self.cluster.problem.model.tensor_bytes:
            return overload.smallest_buffer
        largest, n_layers = overload.largest_tensor_bytes, max(1, len(overload.layer_bytes))
        size = LEAST_BUFFER_BYTES
        for _ in range(3):
            share = max(0, overload.over_bytes + size - overload.expert_bytes) // n_layers
            share = min(share, max(overload.layer_bytes, default=0))
            size = max(
                LEAST_BUFFER_BYTES, share + overload.routed_bytes + largest * (5 if overload.reads_alone else 3) // 2
            )
        return size


def _lack_of(overload: Overload, smallest: int) -> int:
    """Bytes that the memory of a device, or the host's for the buffer, lacks."""
    if not overload.is_beside:
        slot_bytes = overload.passing(overload.over_bytes).slot_bytes
        return max(0, smallest + slot_bytes - overload.room_bytes)
    weights = sum(overload.layer_bytes) + overload.output_bytes
    short = overload.lacking_bytes - overload.passing(overload.over_bytes).gained_bytes
    lacks = max(0, overload.over_bytes - weights), max(0, short), max(0, smallest - (overload.host_room_bytes or 0))
    return sum(lacks)
