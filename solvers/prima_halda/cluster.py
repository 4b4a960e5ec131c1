"""A problem as a solver needs it: places to lay layers on, by number, with what a layer takes and costs on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypedDict

from prima_core.interfaces import Goal
from prima_core.plan.costs import (
    attention_s,
    compute_s,
    demand_bytes_s,
    end_sizes,
    output_bytes,
    routed_share,
    touched_types,
)
from prima_core.plan.pipeline import CPU_CHUNK, is_cpu
from prima_core.plan.problem import OUTPUT, DeviceFacts, LinkFacts, NodeFacts, Problem

Links = Mapping[tuple[str, str], LinkFacts]


@dataclass(frozen=True, slots=True)
class Step:
    """What costs are of: a step of `width` tokens of `rows` sequences, which look back on `n_past` positions each."""

    width: int
    rows: int
    n_past: int

    def of(self, width: int, rows: int) -> Step:
        return replace(self, width=width, rows=rows)


@dataclass(frozen=True, slots=True)
class Place:
    """A device of a node. `sizes`: of every layer there, as weights; `ends_s[i]`: seconds of computing for the first i
    layers. `fixed_bytes`: of the model's ends, of which `table_bytes` are read by rows only."""

    number: int
    member: int
    id: str
    memory_bytes: int
    shares_host: bool
    bytes_s: float
    fixed_bytes: int
    table_bytes: int
    sizes: tuple[int, ...]
    ends_s: tuple[float, ...]
    device: DeviceFacts

    def compute_s(self, start: int, stop: int) -> float:
        return self.ends_s[stop] - self.ends_s[start]

    def copy_s(self, n_bytes: float) -> float:
        """Of weights that are streamed, to a device that copies."""
        return n_bytes / self.device.copy_bytes_s if self.device.copies and self.device.copy_bytes_s else 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """A node. `streaming`: where its weights may be read from disk; None: nowhere."""

    index: int
    name: str
    memory_bytes: int
    places: tuple[Place, ...]
    streaming: Place | None
    disk_bytes_s: float
    demand_bytes_s: float
    disk: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a `step` costs. `hop_s[a][b]`: until its activations are there; `to_output_s[a]`: until those of its wanted
    rows are at the output part; `back_s`: from there to the head; `routed`: the share of a layer's experts that it goes
    through; `output_s`: computing of the output part. `end`: the head's place with an end of the model; `output`: the
    place with the output part.
    """

    problem: Problem
    step: Step
    links: Links
    members: tuple[Member, ...]
    places: tuple[Place, ...]
    hop_s: tuple[tuple[float, ...], ...]
    head: int
    end: Place
    output: Place
    to_output_s: tuple[float, ...]
    back_s: float
    kv_bytes: int
    routed: float
    output_s: float

    @classmethod
    def of(cls, problem: Problem, step: Step | None = None) -> Cluster:
        """`step`: another one than what the goal is about. Raises PlanError where the head is no node."""
        step, links = step or step_of(problem), _links(problem)
        members: list[Member] = []
        places: list[Place] = []
        for index, node in enumerate(problem.nodes):
            own = [
                _place(problem, step, device, index, len(places) + number) for number, device in enumerate(node.places)
            ]
            places += own
            members.append(_member(problem, node, index, own))
        return cls(
            problem=problem,
            step=step,
            links=links,
            members=tuple(members),
            places=tuple(places),
            hop_s=_hops(problem, step, links),
            kv_bytes=problem.model.kv_bytes_per_token_layer * problem.kv_tokens,
            routed=routed_share(problem.model, step.width),
            **_ends(problem, step, links, places),
        )

    def with_step(self, step: Step) -> Cluster:
        """The same with what other steps cost."""
        return self if step == self.step else Cluster.of(self.problem, step)

    def with_output(self, index: int) -> Cluster:
        """The same with the output part on that node. What layers cost stays."""
        if index == self.output.member:
            return self
        problem = self.problem.with_output(self.members[index].name)
        touched = {self.head, self.output.member, index}
        places = tuple(_with_ends(problem, self, place) if place.member in touched else place for place in self.places)
        members = tuple(_with_places(member, places) for member in self.members)
        ends = _ends(problem, self.step, self.links, places)
        return replace(self, problem=problem, members=members, places=places, **ends)

    def on_cpus(self) -> Cluster | None:
        """The same, but nothing is to lie on any other device; None: an end of the model does."""
        if not (is_cpu(self.end.id) and is_cpu(self.output.id)):
            return None
        places = tuple(place if is_cpu(place.id) else replace(place, memory_bytes=0) for place in self.places)
        members = tuple(_with_places(member, places) for member in self.members)
        return replace(self, members=members, places=places)

    @property
    def n_layers(self) -> int:
        return self.problem.model.n_layers

    def reads_alone(self, member: Member) -> bool:
        """Whether no other node's weights are on its disk."""
        return not member.disk or sum(other.disk == member.disk for other in self.members) == 1


def step_of(problem: Problem) -> Step:
    """For the goal: a token of each sequence, or as many tokens of a prompt as usual."""
    if problem.goal is Goal.TTFT:
        return Step(min(problem.chunk or CPU_CHUNK, problem.n_prompt), 1, problem.n_prompt // 2)
    return Step(problem.width, problem.width, problem.n_past)


def unknown_rate(problem: Problem) -> str:
    """The first rate of computing that is not known; "": all are."""
    alone = step_of(problem).width == 1
    for node in problem.nodes:
        for device in node.places:
            if not device.decode_bytes_s or not (alone or device.prefill_bytes_s):
                rate = "prefill_bytes_s" if device.decode_bytes_s else "decode_bytes_s"
                return f"{rate} of {device.id or 'the memory'} on {node.name} is not known"
    return ""


def unknown_disk(problem: Problem) -> str:
    """Why no node may read weights that do not fit, where that is wanted."""
    unknown = [node.name for node in problem.nodes if not node.disk_bytes_s]
    return f"disk_bytes_s of {', '.join(unknown)} is not known" if unknown and problem.streaming else ""


def _place(problem: Problem, step: Step, device: DeviceFacts, member: int, number: int) -> Place:
    model, name = problem.model, problem.nodes[member].name
    past_s = attention_s(device, problem, step.width, step.rows, step.n_past)
    layers_s = (
        past_s + compute_s(device, touched_types(model, layer, step.width), step.width)
        for layer in range(model.n_layers)
    )
    fixed = problem.fixed_bytes_on(name, device.id)
    return Place(
        number=number,
        member=member,
        id=device.id,
        memory_bytes=device.memory_bytes,
        shares_host=device.shares_host,
        bytes_s=device.decode_bytes_s,
        fixed_bytes=fixed,
        table_bytes=min(fixed, problem.table_bytes(name)),
        sizes=tuple(problem.weight_bytes(device)),
        ends_s=tuple(accumulate(layers_s, initial=0.0)),
        device=device,
    )


def _member(problem: Problem, node: NodeFacts, index: int, places: Sequence[Place]) -> Member:
    device = node.streaming_device if problem.streaming and node.disk_bytes_s else None
    return Member(
        index=index,
        name=node.name,
        memory_bytes=node.memory_bytes,
        places=tuple(places),
        streaming=next((place for place in places if device is not None and place.id == device.id), None),
        disk_bytes_s=node.disk_bytes_s,
        demand_bytes_s=demand_bytes_s(node, problem.model),
        disk=node.disk,
    )


class _Ends(TypedDict):
    head: int
    end: Place
    output: Place
    to_output_s: tuple[float, ...]
    back_s: float
    output_s: float


def _ends(problem: Problem, step: Step, links: Links, places: Sequence[Place]) -> _Ends:
    by_name = {(problem.nodes[place.member].name, place.id): place for place in places}
    end = by_name[problem.head, problem.end_device.id]
    to_output, *back = end_sizes(problem, step.rows)
    output = problem.output_node
    return _Ends(
        head=end.member,
        end=end,
        output=by_name[output, problem.output_device.id],
        to_output_s=tuple(links[node.name, output].time_s(to_output) for node in problem.nodes),
        back_s=sum(links[output, problem.head].time_s(size) for size in back),
        output_s=compute_s(problem.output_device, {OUTPUT: output_bytes(problem.model)}, step.rows),
    )


def _with_places(member: Member, places: Sequence[Place]) -> Member:
    """`places`: of all nodes. Nothing is streamed to one without memory."""
    streaming = places[member.streaming.number] if member.streaming is not None else None
    return replace(
        member,
        places=tuple(places[place.number] for place in member.places),
        streaming=streaming if streaming is not None and streaming.memory_bytes else None,
    )


def _with_ends(problem: Problem, cluster: Cluster, place: Place) -> Place:
    name = cluster.members[place.member].name
    fixed = problem.fixed_bytes_on(name, place.id)
    return replace(place, fixed_bytes=fixed, table_bytes=min(fixed, problem.table_bytes(name)))


def _links(problem: Problem) -> Links:
    """As `Problem.link` finds them."""
    names = [node.name for node in problem.nodes]
    found = {(name, name): LinkFacts() for name in names}
    for link in problem.links:
        for source in [link.source] if link.source else names:
            for target in [link.target] if link.target else names:
                found.setdefault((source, target), link)
    return {(source, target): found.get((source, target), LinkFacts()) for source in names for target in names}


def _hops(problem: Problem, step: Step, links: Links) -> tuple[tuple[float, ...], ...]:
    names, size = [node.name for node in problem.nodes], step.width * problem.model.activation_bytes
    return tuple(tuple(links[source, target].time_s(size) for target in names) for source in names)
