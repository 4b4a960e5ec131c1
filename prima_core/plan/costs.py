"""What the parts of a plan cost on their nodes: seconds of computing and of links, bytes of disk. From measured rates.

Attention is counted as if K and V of the positions that a token looks back on were weights: a step goes through them
once for each sequence, and computes with them once for each token. Norms are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.problem import OUTPUT, RANDOM_BYTES, DeviceFacts, ModelFacts, NodeFacts, Problem
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
    """A pass of some tokens; behind the layers comes the visit to the output part, and where that is not on the head
    one without computing to the head, which samples."""

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


def demand_bytes_s(node: NodeFacts, model: ModelFacts) -> float:
    """How fast experts are read, once a token has chosen them: each matrix of one lies elsewhere than the one before.
    That takes as long as in order, and the way to it, which `random_bytes_s` tells of pieces of RANDOM_BYTES."""
    if not (model.expert_bytes and node.random_bytes_s and node.disk_bytes_s):
        return node.disk_bytes_s
    way_s = max(0.0, RANDOM_BYTES / node.random_bytes_s - RANDOM_BYTES / node.disk_bytes_s)
    return 1 / (1 / node.disk_bytes_s + way_s / max(1.0, _expert_matrix_bytes(model)))


def _expert_matrix_bytes(model: ModelFacts) -> float:
    """Of the usual three of an expert, gate, up and down, where the kinds of their stacks are not known."""
    stacks = [
        model.kinds[number].n_bytes
        for kinds, dense in zip(model.layer_kinds, model.tensor_bytes, strict=False)
        for number in kinds[len(dense) :]
    ]
    n_stacks = len(stacks) or 3 * sum(map(bool, model.expert_bytes))
    return (sum(stacks) or sum(model.expert_bytes)) / max(1, n_stacks * model.n_experts)


def missing_rate(plan: Plan, problem: Problem, width: int = 1) -> str:
    """What is not known and would have to be, to foretell the plan's times; "": all is known."""
    problem = problem.with_output(plan.output)
    for node, device in dict.fromkeys(_used_devices(plan, problem)):
        facts = next(place for place in problem.node(node).places if place.id == device)
        if not facts.decode_bytes_s or (width > 1 and not facts.prefill_bytes_s):
            rate = "prefill_bytes_s" if facts.decode_bytes_s else "decode_bytes_s"
            return f"{rate} of {device or 'the memory'} on {node}"
    for name in dict.fromkeys(need.node for need in plan.residency if need.buffer_bytes and need.disk_bytes):
        if not problem.node(name).disk_bytes_s:
            return f"disk_bytes_s of {name}"
    return ""


def _used_devices(plan: Plan, problem: Problem) -> Iterator[tuple[str, str]]:
    for visit in plan.visits:
        for part in visit.parts(problem.node(visit.node).places[0].id):
            yield visit.node, part.device
    yield plan.head, problem.end_device.id
    yield plan.output_node, problem.output_device.id


def pass_cost(plan: Plan, problem: Problem, width: int = 1, rows: int = 1, n_past: int | None = None) -> PassCost:
    """What a pass of `width` tokens costs, of a completed plan whose rates are all known; `rows` of them are wanted of
    the output part, each of a sequence. A token looks back on `n_past` positions; None: as many as the problem says.
    What the residency streams is spread as a store does it: experts first, the rest evenly over the layers, the output
    part last."""
    problem = problem.with_output(plan.output)
    shares = {(need.node, need.device): _Shares.of(need, plan, problem, width) for need in plan.residency}
    model = problem.model
    sizes = [*[width * model.activation_bytes] * len(plan.visits), *end_sizes(problem, rows)]
    ways = pairwise((plan.head, *plan.stops))
    hops = [problem.link(*way).time_s(size) for way, size in zip(ways, sizes, strict=True)]
    past_s = {
        (node.name, device.id): attention_s(device, problem, width, rows, n_past)
        for node in map(problem.node, plan.nodes)
        for device in node.places
    }
    visits = [
        VisitCost(visit.node, hop_s, tuple(_layers(visit, problem, shares, past_s, width)))
        for visit, hop_s in zip(plan.visits, hops, strict=False)
    ]
    visits.append(VisitCost(plan.output_node, hops[len(visits)], tuple(_output(plan, problem, shares, rows))))
    return PassCost((*visits, *(VisitCost(plan.head, hop_s, ()) for hop_s in hops[len(visits) :])))


def end_sizes(problem: Problem, rows: int) -> list[int]:
    """Bytes of the way to the output part and, if that is not on the head, of the way back from there."""
    to_output = rows * problem.model.activation_bytes
    return [to_output, rows * problem.model.logits_bytes] if problem.output else [to_output]


def _layers(
    visit: Visit,
    problem: Problem,
    shares: Mapping[tuple[str, str], _Shares],
    past_s: Mapping[tuple[str, str], float],
    width: int,
) -> Iterator[LayerCost]:
    places = {device.id: device for device in problem.node(visit.node).places}
    for part in visit.parts(next(iter(places))):
        share = shares.get((visit.node, part.device), _Shares())
        for layer in part.layers:
            experts = problem.model.expert_bytes[layer] if problem.model.expert_bytes else 0
            layer_s = compute_s(places[part.device], touched_types(problem.model, layer, width), width)
            layer_s += past_s[visit.node, part.device] + share.copied_s(experts)
            yield LayerCost(layer_s, share.read.dense, share.read.routed * experts)


def _output(plan: Plan, problem: Problem, shares: dict[tuple[str, str], _Shares], rows: int) -> Iterator[LayerCost]:
    """A streamed matrix comes through the buffer in blocks."""
    device, node = problem.output_device, plan.output_node
    share = shares.get((node, device.id), _Shares())
    took_s = compute_s(device, {OUTPUT: output_bytes(problem.model)}, rows) + share.copy_s(share.streamed.output)
    room = sum(need.buffer_bytes for need in plan.residency if need.node == node)
    n_blocks = int(4 * share.read.output // room) + 1 if room else 1
    for _ in range(n_blocks):
        yield LayerCost(took_s / n_blocks, share.read.output / n_blocks)


def compute_s(device: DeviceFacts, types: Mapping[str, float], width: int = 1) -> float:
    """Seconds in which a device computes a step of `width` tokens: `types` are the weight bytes, as in the file, that
    the step goes through, by type (or `OUTPUT`). A type that was not measured is taken to be as fast as the whole.

    `decode_bytes_s` has to be known, and for other widths than 1 `prefill_bytes_s`.
    """
    return sum(n_bytes * _byte_s(device, name, width) for name, n_bytes in types.items())


def _byte_s(device: DeviceFacts, name: str, width: int) -> float:
    """Between two measured widths it grows evenly with the width, and beyond the largest in proportion to it."""
    measured = device.rates.get(name)
    if not measured:
        return _mean_byte_s(device, width)
    last, rate = measured[-1]
    if width >= last:
        return width / last / rate
    below = max(((at, rate) for at, rate in measured if at <= width), default=measured[0])
    above = min((at, rate) for at, rate in measured if at >= min(width, last))
    share = (width - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return (1 - share) / below[1] + share / above[1]


def _mean_byte_s(device: DeviceFacts, width: int) -> float:
    """Weights come from memory once for all tokens, until computing itself takes longer."""
    once_s = 1 / device.decode_bytes_s
    return once_s if width == 1 else max(once_s, width / device.prefill_bytes_s)


def attention_s(
    device: DeviceFacts, problem: Problem, width: int = 1, rows: int = 1, n_past: int | None = None
) -> float:
    """Seconds of a layer's attention in a step of `width` tokens of `rows` sequences, each of which looks back on
    `n_past` positions; None: as many as the problem says."""
    n_bytes = problem.model.kv_bytes_per_token_layer * (problem.n_past if n_past is None else n_past)
    if not n_bytes or not device.decode_bytes_s:
        return 0.0
    with_all = width / device.prefill_bytes_s if device.prefill_bytes_s else 0.0
    return n_bytes * max(rows / device.decode_bytes_s, with_all)


def touched_types(model: ModelFacts, layer: int, width: int = 1) -> dict[str, float]:
    """Bytes of a layer's weights, as in the file, that `width` tokens go through, by type ("": not known). Experts are
    taken to be of the layer's types in the same shares as all of it."""
    whole, experts = model.layer_bytes[layer], model.expert_bytes[layer] if model.expert_bytes else 0
    share = 1 - experts * (1 - routed_share(model, width)) / max(1, whole)
    types = {name: sizes[layer] for name, sizes in model.layer_types.items() if sizes[layer]} or {"": whole}
    return {name: n_bytes * share for name, n_bytes in types.items()}


def output_bytes(model: ModelFacts) -> int:
    """What the output part goes through: its own matrix, or the embedding."""
    return model.output_bytes + (model.input_bytes if model.is_tied else 0)


def routed_share(model: ModelFacts, width: int) -> float:
    """How much of a layer's experts `width` tokens go through, when all are chosen alike; 1 without experts."""
    return chosen_share(model.n_experts_used, model.n_experts, width) if model.expert_bytes else 1.0


def chosen_share(n_used: int, n_experts: int, width: int) -> float:
    """Of a layer's experts, by `width` tokens of which each chooses `n_used`."""
    return 1 - (1 - n_used / n_experts) ** width


@dataclass(frozen=True, slots=True)
class _Parts:
    """`dense` bytes of each of a device's layers, `routed` of each byte of a layer's experts, `output` bytes of the
    output part."""

    dense: float = 0.0
    routed: float = 0.0
    output: float = 0.0


@dataclass(frozen=True, slots=True)
class _Shares:
    """What a device streams in a pass, and what of that is read from disk. `copy_bytes_s`: on to the device, before it
    computes; 0: in no time."""

    streamed: _Parts = _Parts()
    read: _Parts = _Parts()
    copy_bytes_s: float = 0.0

    def copied_s(self, expert_bytes: int) -> float:
        """Of a layer with such experts."""
        return self.copy_s(self.streamed.dense + self.streamed.routed * expert_bytes)

    def copy_s(self, n_bytes: float) -> float:
        return n_bytes / self.copy_bytes_s if self.copy_bytes_s else 0.0

    @classmethod
    def of(cls, need: Residency, plan: Plan, problem: Problem, width: int) -> _Shares:
        model, node = problem.model, problem.node(need.node)
        layers = layers_on(plan, node, need.device)
        table = min(problem.fixed_bytes_on(need.node, need.device), problem.table_bytes(need.node))
        experts = sum(model.expert_bytes[layer] for layer in layers) if model.expert_bytes else 0
        device = next(place for place in node.places if place.id == need.device)
        sizes = problem.weight_bytes(device)
        dense = sum(sizes[layer] for layer in layers) - experts
        routed = 1.0 if device.copies else routed_share(model, width)  # which are chosen, nobody asks there

        def parts(n_bytes: int) -> _Parts:
            """When so many are left out of memory."""
            rest = max(0, n_bytes - table)
            of_dense = min(max(0, rest - experts), dense)
            return _Parts(
                of_dense / max(1, len(layers)),
                routed * min(rest, experts) / max(1, experts),
                max(0, rest - experts - of_dense),
            )

        copy_bytes_s = device.copy_bytes_s if device.copies else 0.0
        return cls(parts(need.streamed_bytes), parts(need.disk_bytes), copy_bytes_s)
