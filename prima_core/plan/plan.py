"""What all nodes must agree on: who computes which layers, in which order. Pure data with a JSON round trip."""

from __future__ import annotations

import itertools
from typing import Annotated

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import KvType, Layers
from prima_core.plan.explanation import Explanation
from prima_core.plan.forecast import Forecast


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The layers [start, stop) of a visit that one device of the node computes."""

    device: str
    start: int
    stop: int

    @property
    def layers(self) -> Layers:
        return Layers(self.start, self.stop)


class Visit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node computes the layers [start, stop). `split` empty: all on the node's first device."""

    node: str
    start: int
    stop: int
    split: tuple[Split, ...] = ()

    @property
    def layers(self) -> Layers:
        return Layers(self.start, self.stop)

    def parts(self, first_device: str) -> tuple[Split, ...]:
        """Its layers by device, in order."""
        return self.split or (Split(first_device, self.start, self.stop),)


class Residency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that the plan takes on a device of a node: weights as large as they are there, and room for KV.

    `streamed_bytes` of `weight_bytes`, as large as in the file, are not kept in memory but read from disk in every
    pass, ahead of their use, into a buffer of `buffer_bytes` of the host's memory. A device that copies weights has
    them pass through slots of `slot_bytes` in its own; where that is not the host's memory, `host_bytes` of them stay
    there, as in the file, and are copied but not read. All are 0 where all weights stay. A solver may leave them 0:
    `complete` fills them, and `slot_bytes` and `host_bytes` in any case. What of a node is streamed, or does not stay
    in the host's memory either, goes in this order: a token embedding that is not also the output matrix (of which only
    the rows of a step's tokens are read, by the map), stacks of experts, the rest of the layers evenly, and last the
    output matrix.
    """

    node: str
    device: str
    weight_bytes: int
    kv_bytes: int
    streamed_bytes: int = 0
    buffer_bytes: int = 0
    slot_bytes: int = 0
    host_bytes: int = 0

    @property
    def pinned_bytes(self) -> int:
        """Weights that stay in the device's memory."""
        return self.weight_bytes - self.streamed_bytes

    @property
    def disk_bytes(self) -> int:
        """Weights that stay in no memory."""
        return self.streamed_bytes - self.host_bytes


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a solver says of its plan. `bound_s`: the time per token below which there is none, of the question that
    it answered; 0: not known. `about`: in words, what that question was, what is not exact, and why it fell back."""

    bound_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    about: str = ""


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A list of visits that covers [0, n_layers) in order. `head` runs the input part and samples, `output` the output
    part ("": the head too); from there the logits of wanted rows go to the head.

    `kv_tokens`: KV positions, over all sequences, that every visited node has room for (0: the problem's).
    `kv_type`: what K and V are kept in. `context`: positions that a sequence may reach (0: the problem's).
    `end_device`: the head's device with the input part, and the output part if that is there ("": its first).
    `output_device`: that of another node with the output part ("": its first).
    `in_flight`: steps that may be between launch and collect (0: automatic, see `credit`).
    `gather_bytes`: activations of a prompt that a node which streams may collect, to run them together (0: none).
    `forecast`, `explanation` and `certificate`: for who looks at them; nothing depends on them.
    """

    n_layers: int
    head: str
    visits: tuple[Visit, ...]
    residency: tuple[Residency, ...] = ()
    kv_tokens: int = 0
    kv_type: KvType = KvType.F16
    context: Annotated[int, msgspec.Meta(ge=0)] = 0
    end_device: str = ""
    in_flight: int = 0
    solver: str = ""
    gather_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    forecast: Forecast | None = None
    certificate: Certificate | None = None
    explanation: Explanation | None = None
    output: str = ""
    output_device: str = ""

    @property
    def output_node(self) -> str:
        return self.output or self.head

    @property
    def device_of_output(self) -> str:
        """On the node with the output part; "": its first."""
        return self.end_device if self.output_node == self.head else self.output_device

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a step goes: the node of each visit, that of the output part and, if it is another one, the head."""
        ends = (self.head,) if self.output_node == self.head else (self.output_node, self.head)
        return (*(visit.node for visit in self.visits), *ends)

    @property
    def credit(self) -> int:
        """Steps that may be under way. One more than there are visits keeps every node busy. But a node which streams
        and is visited several times in a pass reads ahead in the order of its visits: a second step would come in
        between, and have it read again what it has just let go. So there one step goes round at a time, of a prompt a
        large chunk."""
        return self.in_flight or (1 if self.streams_in_rounds else len(self.visits) + 1)

    @property
    def streams_in_rounds(self) -> bool:
        """Whether some node streams weights and is visited more than once in a pass. Of a completed plan."""
        streaming = {need.node for need in self.residency if need.buffer_bytes}
        return any(sum(visit.node == node for visit in self.visits) > 1 for node in streaming)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The visited nodes and those with the ends of the model, each once, the head first."""
        return tuple(dict.fromkeys((self.head, *self.stops)))

    def layers_of(self, node: str) -> tuple[Layers, ...]:
        return tuple(visit.layers for visit in self.visits if visit.node == node)

    def bytes_on(self, node: str, device: str) -> int:
        """What a completed plan takes on a device."""
        needs = (need for need in self.residency if (need.node, need.device) == (node, device))
        return sum(need.pinned_bytes + need.slot_bytes + need.buffer_bytes + need.kv_bytes for need in needs)

    def successors(self, node: str) -> tuple[str, ...]:
        """Nodes, other than itself, that `node` sends activations to."""
        ways = itertools.pairwise((self.head, *self.stops))
        return tuple(dict.fromkeys(b for a, b in ways if a == node and b != node))


def plan_to_json(plan: Plan) -> bytes:
    return msgspec.json.format(msgspec.json.encode(plan), indent=2)


def plan_from_json(data: bytes) -> Plan:
    """Raises PlanError naming the field when `data` is not a plan."""
    try:
        return msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"not a plan: {error}", hint="`prima plan --json` prints one to start from") from error
