"""What the parts of a plan cost on their nodes: seconds of computing and of links, bytes of disk. From measured rates.

Attention over what K and V hold is not counted, nor are norms: both are small where weights come from disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.problem import DeviceFacts, Problem
from prima_core.plan.stream import layers_on


@dataclass(frozen=True, slots=True)
class LayerCost:
    """`streamed_bytes` can be read ahead; `demanded_bytes`, of experts, only once the layer has begun."""

    compute_s: float
    streamed_bytes: float = 0.0
    demanded_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class VisitCost:
    """`hop_s`: until the activations are there."""

    node: str
    hop_s: float
    layers: tuple[LayerCost, ...]


@dataclass(frozen=True, slots=True)
class PassCost:
    """A pass of some tokens; the last visit is to the output part, on the head."""

    visits: tuple[VisitCost, ...]

    @property
    def busy_s(self) -> float:
        """All computing, and all links."""
        return sum(visit.hop_s + sum(layer.compute_s for layer in visit.layers) for visit in self.visits)

    def compute_s(self, node: str) -> float:
        return sum(layer.compute_s for visit in self.visits if visit.node == node for layer in visit.layers)

    def streamed_bytes(self, node: str) -> float:
        return sum(layer.streamed_bytes for visit in self.visits if visit.node == node for layer in visit.layers)

    def demanded_bytes(self, node: str) -> float:
        return sum(layer.demanded_bytes for visit in self.visits if visit.node == node for layer in visit.layers)

    def hop_s(self, node: str) -> float:
        """Of the ways to the node."""
        return sum(visit.hop_s for visit in self.visits if visit.node == node)


def missing_rate(plan: Plan, problem: Problem, width: int = 1) -> str:
    """What is not known and would have to be, to foretell the plan's times; "": all is known."""
    for node, device in dict.fromkeys(_used_devices(plan, problem)):
        facts = next(place for place in problem.node(node).places if place.id == device)
        if not facts.decode_bytes_s or (width > 1 and not facts.prefill_bytes_s):
            rate = "prefill_bytes_s" if facts.decode_bytes_s else "decode_bytes_s"
            return f"{rate} of {device or 'the memory'} on {node}"
    for name in dict.fromkeys(need.node for need in plan.residency if need.buffer_bytes):
        if not problem.node(name).disk_bytes_s:
            return f"disk_bytes_s of {name}"
    return ""


def _used_devices(plan: Plan, problem: Problem) -> Iterator[tuple[str, str]]:
    for visit in plan.visits:
        for part in visit.parts(problem.node(visit.node).places[0].id):
            yield visit.node, part.device
    yield plan.head, problem.end_device.id


def pass_cost(plan: Plan, problem: Problem, width: int = 1) -> PassCost:
    """What a pass of `width` tokens costs, of a completed plan whose rates are all known. What the residency streams is
    spread as a store does it: experts first, the rest evenly over the layers, the output part last."""
    shares = {(need.node, need.device): _Shares.of(need, plan, problem, width) for need in plan.residency}
    stops = [plan.head, *(visit.node for visit in plan.visits), plan.head]
    hops = [
        problem.link(source, target).time_s(width * problem.model.activation_bytes)
        for source, target in pairwise(stops)
    ]
    visits = [
        VisitCost(visit.node, hop_s, tuple(_layers(visit, problem, shares, width)))
        for visit, hop_s in zip(plan.visits, hops, strict=False)
    ]
    output = VisitCost(plan.head, hops[-1], tuple(_output(plan, problem, shares)))
    return PassCost((*visits, output))


def _layers(visit: Visit, problem: Problem, shares: dict[tuple[str, str], _Shares], width: int) -> Iterator[LayerCost]:
    places = {device.id: device for device in problem.node(visit.node).places}
    for part in visit.parts(next(iter(places))):
        share, sizes = shares.get((visit.node, part.device), _Shares()), problem.weight_bytes(places[part.device])
        for layer in part.layers:
            experts = problem.model.expert_bytes[layer] if problem.model.expert_bytes else 0
            touched = sizes[layer] - experts * (1 - routed_share(problem, width))
            compute_s = _compute_s(places[part.device], touched, width)
            demanded = share.routed * experts
            yield LayerCost(compute_s + share.copy_s(share.dense + demanded), share.dense, demanded)


def _output(plan: Plan, problem: Problem, shares: dict[tuple[str, str], _Shares]) -> Iterator[LayerCost]:
    """Only of the last token; a streamed matrix comes through the buffer in blocks."""
    device, model = problem.end_device, problem.model
    n_bytes = model.output_bytes if model.input_row_bytes else model.input_bytes + model.output_bytes
    share = shares.get((plan.head, device.id), _Shares())
    streamed = share.output
    room = sum(need.buffer_bytes for need in plan.residency if need.node == plan.head)
    n_blocks = int(4 * streamed // room) + 1 if room else 1
    for _ in range(n_blocks):
        yield LayerCost((_compute_s(device, n_bytes, 1) + share.copy_s(streamed)) / n_blocks, streamed / n_blocks)


def _compute_s(device: DeviceFacts, n_bytes: float, width: int) -> float:
    """Weights come from memory once for all tokens, until computing itself takes longer."""
    once_s = n_bytes / device.decode_bytes_s
    return once_s if width == 1 else max(once_s, n_bytes * width / device.prefill_bytes_s)


def routed_share(problem: Problem, width: int) -> float:
    """How much of a layer's experts `width` tokens go through, when all are chosen alike; 1 without experts."""
    model = problem.model
    if not model.expert_bytes:
        return 1.0
    return 1 - (1 - model.n_experts_used / model.n_experts) ** width


@dataclass(frozen=True, slots=True)
class _Shares:
    """What a device streams in a pass: `dense` bytes of each of its layers, `routed` of each byte of a layer's experts,
    `output` bytes of the output part. `copy_bytes_s`: on to the device, before it computes; 0: in no time."""

    dense: float = 0.0
    routed: float = 0.0
    output: float = 0.0
    copy_bytes_s: float = 0.0

    def copy_s(self, n_bytes: float) -> float:
        return n_bytes / self.copy_bytes_s if self.copy_bytes_s else 0.0

    @classmethod
    def of(cls, need: Residency, plan: Plan, problem: Problem, width: int) -> _Shares:
        model, node = problem.model, problem.node(need.node)
        layers = layers_on(plan, node, need.device)
        has_ends = need.node == plan.head and need.device == problem.end_device.id
        table = model.input_bytes if has_ends and model.input_row_bytes else 0
        streamed = max(0, need.streamed_bytes - table)
        experts = sum(model.expert_bytes[layer] for layer in layers) if model.expert_bytes else 0
        device = next(place for place in node.places if place.id == need.device)
        sizes = problem.weight_bytes(device)
        dense = min(max(0, streamed - experts), sum(sizes[layer] for layer in layers) - experts)
        routed = 1.0 if device.copies else routed_share(problem, width)  # which are chosen, nobody asks there
        return cls(
            dense / max(1, len(layers)),
            routed * min(streamed, experts) / max(1, experts),
            max(0, streamed - experts - dense),
            device.copy_bytes_s if device.copies else 0.0,
        )
