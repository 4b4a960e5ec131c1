"""What a way to lay the layers on places takes: its memory, and its time as the simulation has it.

A way is a tuple with the number of a place for every layer. This is `complete` and `predict` for thousands of ways: it
counts the same, but only what changes from way to way, and with a quick guess at the smallest buffer where that depends
on single tensors. The last word have the originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from prima_core.plan.costs import LayerCost, PassCost, VisitCost
from prima_core.plan.overlap import Reader, best_buffers
from prima_core.plan.simulate import Disk, simulate
from prima_core.plan.slots import slots_of
from prima_core.plan.stream import LEAST_BUFFER_BYTES, Overload, gather_bytes
from prima_halda.cluster import Cluster, Member

Way = tuple[int, ...]
Layers = tuple[tuple[int, ...], ...]
"""Of a node, by place."""
Run = tuple[int, int, int]
"""Place, start, stop."""
Turn = tuple[int, list[Run]]
"""A node and its runs of layers, until another one's turn."""

_GAIN = 1 - 1e-6
"""A smaller one is none."""
_SLACK = 1.01
"""Who is slower than his rival by more than that in the rough simulation is not followed closely."""
_PASSES = 4
"""That are usually simulated."""


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


@dataclass(frozen=True, slots=True)
class Trial:
    """A way that can be, with the buffers (by node) with which a token takes `time_s`, by a rough simulation
    `about_s`."""

    way: Way
    time_s: float
    about_s: float
    buffers: Mapping[int, int]


@dataclass(slots=True)
class Judge:
    """`n_steps`: about how many layers were simulated so far, which is what time goes to."""

    cluster: Cluster
    n_steps: int = 0
    _fits: dict[tuple[int, Layers], bool | None] = field(default_factory=dict)
    _lacking: dict[tuple[int, Layers], int] = field(default_factory=dict)
    _loads: dict[tuple[int, Layers, int], Load | None] = field(default_factory=dict)

    def trial(self, way: Way, rival: Trial | None = None, buffers: Mapping[int, int] | None = None) -> Trial | None:
        """None: it cannot be, or seems to be no faster than its rival. `buffers`: not the best ones, but these."""
        self.n_steps += 2 + len(way) // 16
        under_s = rival.time_s * _GAIN if rival is not None else float("inf")
        visits = self.visits(way)
        computing = self._computing(visits)
        busy_s = sum(computing.values()) + self._links_s(visits)
        loads = self.loads(way) if busy_s < under_s else None
        if loads is None:
            return None
        if not loads:
            return Trial(way, busy_s, busy_s, {})
        readers = self.readers(visits, loads, computing)
        busy_s += sum(self._demanded_s(load, index) for index, load in loads.items())
        if self._bound_s(list(readers.values()), busy_s) >= under_s:
            return None
        if buffers is None:
            buffers = dict(zip(readers, best_buffers(list(readers.values()), busy_s), strict=True))
        buffers = {
            index: max(min(buffers.get(index, 0), load.overload.most_buffer), load.smallest)
            for index, load in loads.items()
        }
        about_s = self._about_s(visits, loads, buffers)
        if rival is not None and about_s > _SLACK * rival.about_s:
            return None
        time_s = self._simulated_s(visits, loads, buffers)
        return Trial(way, time_s, about_s, buffers) if time_s < under_s else None

    # ------------------------------------------------------------ memory

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
        self.n_steps += 2 + len(way) // 16
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
        """The layers of every node that is visited, and of the head."""
        by_place: dict[int, list[int]] = {}
        for layer, number in enumerate(way):
            by_place.setdefault(number, []).append(layer)
        used = {self.cluster.places[number].member for number in by_place} | {self.cluster.head}
        return {
            index: tuple(tuple(by_place.get(place.number, ())) for place in self.cluster.members[index].places)
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
        model, table = cluster.problem.model, cluster.table_bytes if place.fixed_bytes else 0
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

    # ------------------------------------------------------------ time

    def visits(self, way: Way) -> list[Turn]:
        """Nodes in turn, each with its runs of layers: place, start, stop."""
        runs, start = list[Run](), 0
        for number, run in groupby(way):
            stop = start + sum(1 for _ in run)
            runs.append((number, start, stop))
            start = stop
        places = self.cluster.places
        return [(index, list(own)) for index, own in groupby(runs, lambda run: places[run[0]].member)]

    def readers(
        self, visits: Sequence[Turn], loads: Mapping[int, Load], computing: Mapping[int, float]
    ) -> dict[int, Reader]:
        names = [index for index, _ in visits]
        readers = {}
        for index, load in loads.items():
            member = self.cluster.members[index]
            n_turns = sum(name == index != names[position - 1] for position, name in enumerate(names))
            readers[index] = Reader(
                over_bytes=load.overload.dense_over_bytes,
                n_visits=max(1, n_turns),
                compute_s=computing.get(index, 0.0),
                bytes_s=member.disk_bytes_s,
                least_bytes=load.smallest,
                most_bytes=load.overload.most_buffer,
                disk=member.disk,
                beside=load.overload.is_beside,
            )
        return readers

    def _computing(self, visits: Sequence[Turn]) -> dict[int, float]:
        places, totals = self.cluster.places, {self.cluster.head: self.cluster.output_s}
        for index, runs in visits:
            own = sum(places[number].compute_s(start, stop) for number, start, stop in runs)
            totals[index] = totals.get(index, 0.0) + own
        return totals

    def _links_s(self, visits: Sequence[Turn]) -> float:
        stops = [self.cluster.head, *(index for index, _ in visits), self.cluster.head]
        return sum(self.cluster.hop_s[a][b] for a, b in pairwise(stops))

    def _demanded_s(self, load: Load, index: int) -> float:
        routed = self.cluster.routed if load.overload.slots is None else 1.0
        return load.overload.experts_over_bytes * routed / self.cluster.members[index].disk_bytes_s

    def _bound_s(self, readers: Sequence[Reader], busy_s: float) -> float:
        """No buffers do better: all that a buffer can hide is hidden, or the least is read."""
        stalls = sum(reader.stall_s(reader.most_bytes) for reader in readers)
        return max(busy_s + stalls, *(reader.read_s(reader.least_bytes) for reader in readers))

    def _about_s(self, visits: Sequence[Turn], loads: Mapping[int, Load], buffers: Mapping[int, int]) -> float:
        """A simulation in which a visit is one thing: it ends when all is computed, and its last layer was read in
        time. Disks are taken for each node's own."""
        cluster, head = self.cluster, self.cluster.head
        stops = [head, *(index for index, _ in visits)]
        turns = [
            (cluster.hop_s[before][index], *self._turn(index, runs, loads.get(index), buffers.get(index, 0)))
            for before, (index, runs) in zip(stops, visits, strict=False)
        ]
        fills, left_s, now_s, began_s = dict.fromkeys(loads, 0.0), dict.fromkeys(loads, 0.0), 0.0, 0.0
        self.n_steps += len(turns)
        for _ in range(_PASSES):
            began_s = now_s
            for hop_s, index, compute_s, last_s, n_bytes in turns:
                now_s += hop_s
                if index not in loads:
                    now_s += compute_s
                    continue
                rate, size = cluster.members[index].disk_bytes_s, buffers[index]
                fill = min(size, fills[index] + rate * (now_s - left_s[index]))
                took_s = max(compute_s, (n_bytes - fill) / rate + last_s)
                now_s += took_s
                fills[index], left_s[index] = min(size, max(0.0, fill + rate * took_s - n_bytes)), now_s
            now_s += cluster.output_s + cluster.hop_s[stops[-1]][head]
        return now_s - began_s

    def _turn(
        self, index: int, runs: Sequence[Run], load: Load | None, buffer_bytes: int
    ) -> tuple[int, float, float, float]:
        """The node, its computing in all and of the last layer that is read, and what it has to read."""
        places = self.cluster.places
        compute_s = sum(places[number].compute_s(start, stop) for number, start, stop in runs)
        if load is None:
            return index, compute_s, 0.0, 0.0
        streaming = [run for run in runs if places[run[0]].id == load.overload.device]
        n_layers = sum(stop - start for _, start, stop in streaming)
        if not n_layers:
            return index, compute_s, 0.0, 0.0
        number, _, stop = streaming[-1]
        n_bytes = load.streamed(buffer_bytes) * n_layers / load.n_layers
        return index, compute_s + places[number].copy_s(n_bytes), places[number].compute_s(stop - 1, stop), n_bytes

    def _simulated_s(self, visits: Sequence[Turn], loads: Mapping[int, Load], buffers: Mapping[int, int]) -> float:
        cluster = self.cluster
        stops = [cluster.head, *(index for index, _ in visits)]
        costs = [
            VisitCost(
                cluster.members[index].name,
                cluster.hop_s[before][index],
                tuple(layer for run in runs for layer in self._layers(run, loads.get(index), buffers.get(index, 0))),
            )
            for before, (index, runs) in zip(stops, visits, strict=False)
        ]
        output = tuple(self._output(loads.get(cluster.head), buffers.get(cluster.head, 0)))
        costs.append(VisitCost(cluster.members[cluster.head].name, cluster.hop_s[stops[-1]][cluster.head], output))
        disks = {
            cluster.members[index].name: Disk(
                cluster.members[index].disk_bytes_s, buffers[index], cluster.members[index].disk
            )
            for index in loads
        }
        self.n_steps += _PASSES * sum(len(visit.layers) for visit in costs)
        return simulate(PassCost(tuple(costs)), disks).pass_s

    def _layers(self, run: Run, load: Load | None, buffer_bytes: int) -> Iterator[LayerCost]:
        """Layers that stay are as good as one."""
        number, start, stop = run
        place = self.cluster.places[number]
        if load is None or place.id != load.overload.device:
            yield LayerCost(place.compute_s(start, stop))
            return
        overload, experts = load.overload, self.cluster.problem.model.expert_bytes
        streamed = load.streamed(buffer_bytes)
        dense = min(max(0.0, streamed - overload.expert_bytes), sum(overload.layer_bytes) - overload.expert_bytes)
        routed = self.cluster.routed if overload.slots is None else 1.0
        routed *= min(streamed, overload.expert_bytes) / max(1, overload.expert_bytes)
        for layer in range(start, stop):
            own, demanded = dense / max(1, load.n_layers), routed * experts[layer] if experts else 0.0
            yield LayerCost(place.compute_s(layer, layer + 1) + place.copy_s(own + demanded), own, demanded)

    def _output(self, load: Load | None, buffer_bytes: int) -> Iterator[LayerCost]:
        compute_s = self.cluster.output_s
        streamed = 0.0
        if load is not None and load.overload.device == self.cluster.end.id:
            streamed = max(0.0, load.streamed(buffer_bytes) - sum(load.overload.layer_bytes))
        n_blocks = int(4 * streamed // buffer_bytes) + 1 if streamed and buffer_bytes else 1
        for _ in range(n_blocks):
            yield LayerCost((compute_s + self.cluster.end.copy_s(streamed)) / n_blocks, streamed / n_blocks)


def _lack_of(overload: Overload, smallest: int) -> int:
    """Bytes that the memory of a device, or the host's for the buffer, lacks."""
    if overload.host_room_bytes is None:
        slot_bytes = overload.passing(overload.over_bytes).slot_bytes
        return max(0, smallest + slot_bytes - overload.room_bytes)
    weights = sum(overload.layer_bytes) + overload.output_bytes
    return max(0, overload.over_bytes - weights) + max(0, smallest - overload.host_room_bytes)
