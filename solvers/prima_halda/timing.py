"""How long the steps of a way take: as `pass_cost` and `simulate` have it, for thousands of ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from prima_core.plan.costs import LayerCost, PassCost, VisitCost
from prima_core.plan.overlap import Reader
from prima_core.plan.simulate import Disk
from prima_halda.cluster import Cluster
from prima_halda.memory import Load, Way

Run = tuple[int, int, int]
"""Place, start, stop."""
Turn = tuple[int, list[Run]]
"""A node and its runs of layers, until another one's turn."""

PASSES = 4
"""That are usually simulated."""


def turns_of(cluster: Cluster, way: Way) -> list[Turn]:
    """Nodes in turn, each with its runs of layers."""
    places, turns, start = cluster.places, list[Turn](), 0
    for stop in range(1, len(way) + 1):
        number = way[start]
        if stop == len(way) or way[stop] != number:
            index = places[number].member
            if not turns or turns[-1][0] != index:
                turns.append((index, []))
            turns[-1][1].append((number, start, stop))
            start = stop
    return turns


@dataclass(frozen=True, slots=True)
class Timing:
    """Of a cluster with the costs of one kind of step."""

    cluster: Cluster

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
                spare_bytes=load.overload.spare_bytes,
            )
        return readers

    def computing(self, visits: Sequence[Turn]) -> dict[int, float]:
        places, totals = self.cluster.places, {self.cluster.output.member: self.cluster.output_s}
        for index, runs in visits:
            own = sum(places[number].compute_s(start, stop) for number, start, stop in runs)
            totals[index] = totals.get(index, 0.0) + own
        return totals

    def links_s(self, visits: Sequence[Turn]) -> float:
        stops = [self.cluster.head, *(index for index, _ in visits)]
        hops_s = sum(self.cluster.hop_s[a][b] for a, b in pairwise(stops))
        return hops_s + self.cluster.to_output_s[stops[-1]] + self.cluster.back_s

    def demanded_s(self, load: Load, index: int) -> float:
        return load.overload.experts_over_bytes * self._routed(load) / self.cluster.members[index].demand_bytes_s

    def about_s(self, visits: Sequence[Turn], loads: Mapping[int, Load], buffers: Mapping[int, int]) -> float:
        """A simulation in which a visit is one thing: it ends when all is computed, and its last layer was read in
        time. Disks are taken for each node's own."""
        cluster = self.cluster
        stops = [cluster.head, *(index for index, _ in visits)]
        turns = [
            (cluster.hop_s[before][index], *self._turn(index, runs, loads.get(index), buffers.get(index, 0)))
            for before, (index, runs) in zip(stops, visits, strict=False)
        ]
        fills, left_s, now_s, began_s = dict.fromkeys(loads, 0.0), dict.fromkeys(loads, 0.0), 0.0, 0.0
        for _ in range(PASSES):
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
            now_s += cluster.output_s + cluster.to_output_s[stops[-1]] + cluster.back_s
        return now_s - began_s

    def _turn(
        self, index: int, runs: Sequence[Run], load: Load | None, buffer_bytes: int
    ) -> tuple[int, float, float, float]:
        """The node, its computing in all, experts' coming with it, and of the last layer that is read; and what it has
        to read ahead."""
        places = self.cluster.places
        compute_s = sum(places[number].compute_s(start, stop) for number, start, stop in runs)
        if load is None:
            return index, compute_s, 0.0, 0.0
        streaming = [run for run in runs if places[run[0]].id == load.overload.device]
        n_layers = sum(stop - start for _, start, stop in streaming)
        if not n_layers:
            return index, compute_s, 0.0, 0.0
        number, _, stop = streaming[-1]
        share = n_layers / load.n_layers
        compute_s += places[number].copy_s(load.streamed(buffer_bytes) * share)
        read = load.read(buffer_bytes)
        experts = min(read, load.overload.expert_bytes)
        compute_s += experts * share * self._routed(load) / self.cluster.members[index].demand_bytes_s
        return index, compute_s, places[number].compute_s(stop - 1, stop), (read - experts) * share

    def pass_cost(self, visits: Sequence[Turn], loads: Mapping[int, Load], buffers: Mapping[int, int]) -> PassCost:
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
        index = cluster.output.member
        output = tuple(self._output(loads.get(index), buffers.get(index, 0)))
        costs.append(VisitCost(cluster.members[index].name, cluster.to_output_s[stops[-1]], output))
        if index != cluster.head:
            costs.append(VisitCost(cluster.members[cluster.head].name, cluster.back_s, ()))
        return PassCost(tuple(costs))

    def disks(self, buffers: Mapping[int, int]) -> dict[str, Disk]:
        """Of the nodes that stream."""
        members = {index: self.cluster.members[index] for index in buffers}
        return {
            one.name: Disk(one.disk_bytes_s, buffers[index], one.disk, one.demand_bytes_s)
            for index, one in members.items()
        }

    def slowest_s(self, visits: Sequence[Turn], computing: Mapping[int, float]) -> float:
        """Of the stages of steps that follow each other, where nothing is read."""
        cluster = self.cluster
        head, output, links = cluster.head, cluster.output.member, dict[int, float]()
        stops = [head, *(index for index, _ in visits)]
        for a, b in pairwise(stops):
            links[b] = links.get(b, 0.0) + cluster.hop_s[a][b]
        links[output] = links.get(output, 0.0) + cluster.to_output_s[stops[-1]]
        links[head] = links.get(head, 0.0) + cluster.back_s
        return max(*computing.values(), *links.values())

    def _layers(self, run: Run, load: Load | None, buffer_bytes: int) -> Iterator[LayerCost]:
        """Layers that stay are as good as one."""
        number, start, stop = run
        place = self.cluster.places[number]
        if load is None or place.id != load.overload.device:
            yield LayerCost(place.compute_s(start, stop))
            return
        experts = self.cluster.problem.model.expert_bytes
        dense, routed = self._parts(load, load.streamed(buffer_bytes))
        read, demanded = self._parts(load, load.read(buffer_bytes))
        for layer in range(start, stop):
            own = experts[layer] if experts else 0
            layer_s = place.compute_s(layer, layer + 1) + place.copy_s(dense + routed * own)
            yield LayerCost(layer_s, read, demanded * own)

    def _parts(self, load: Load, n_bytes: float) -> tuple[float, float]:
        """Of so many: bytes of each layer, and of each byte of its experts those that a step goes through."""
        layers, experts = sum(load.overload.layer_bytes), load.overload.expert_bytes
        dense = min(max(0.0, n_bytes - experts), layers - experts)
        return dense / max(1, load.n_layers), self._routed(load) * min(n_bytes, experts) / max(1, experts)

    def _routed(self, load: Load) -> float:
        """Where weights are copied to a device nobody asks which experts are chosen."""
        return self.cluster.routed if load.overload.slots is None else 1.0

    def _output(self, load: Load | None, buffer_bytes: int) -> Iterator[LayerCost]:
        compute_s, read = self.cluster.output_s, 0.0
        if load is not None and load.overload.device == self.cluster.output.id:
            layers = sum(load.overload.layer_bytes)
            compute_s += self.cluster.output.copy_s(max(0.0, load.streamed(buffer_bytes) - layers))
            read = max(0.0, load.read(buffer_bytes) - layers)
        n_blocks = int(4 * read // buffer_bytes) + 1 if read and buffer_bytes else 1
        for _ in range(n_blocks):
            yield LayerCost(compute_s / n_blocks, read / n_blocks)
