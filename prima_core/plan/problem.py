"""What a solver is asked: the model and the nodes as numbers. Pure data with a JSON round trip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

from prima_core.errors import PlanError
from prima_core.interfaces import MAX_GROWTH, Device, Goal, KvType

Size = Annotated[int, Meta(ge=0, le=2**63 - 1)]
MAX_ROUNDS = 1024
MAX_WIDTH = 4096
PROMPT_TOKENS = 512
MAX_TENSORS = 16
"""Of a layer, apart from small ones: combinations of them are tried."""
MAX_KINDS = 1024
RANDOM_BYTES = 1 << 20
Rate = Annotated[float, Meta(ge=0, le=1e18)]  # NaN and infinity keep no bounds
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Name = Annotated[str, Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]  # ends on terminals
Widths = Annotated[
    tuple[tuple[Annotated[int, Meta(ge=1, le=2**20)], Annotated[float, Meta(ge=1, le=1e18)]], ...], Meta(max_length=16)
]
"""Pairs, by ascending widths: weight bytes that a device goes through in a second of steps of so many tokens."""
TypeRates = Annotated[dict[Name, Widths], Meta(max_length=64)]
OUTPUT = "output"
"""Beside the types of weights: the output matrix, of which a step needs the rows of few tokens only."""


class TensorKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors of one type and shape, each of `n_bytes` in the file."""

    type: Name
    n_bytes: Size


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a model. `layer_bytes` has one entry per decoder layer; `input_bytes` is the token embedding,
    `output_bytes` the final norm and the output matrix (0 where it is tied to the embedding).

    `context_length` is that of the longest sequence that is served, `kv_type` what its K and V are kept in.
    The types say how many of these bytes are of which type, for devices where some types grow; empty: not known.

    For weights that do not stay in memory: `largest_tensor_bytes` of any layer, of a stack of experts one expert's
    (0: not known). `tensor_bytes`: of each layer its tensors that can be streamed as a whole, without experts (empty:
    not known, then buffers are larger than they must be). `input_row_bytes`: a token's row of an embedding that is not
    also the output matrix, all that is read of it (0: it is the output matrix, or not known). `expert_bytes`: of each
    layer, what its stacks of experts take; a token goes through `n_experts_used` of `n_experts`. `activation_bytes`: of
    one token, from node to node; `row_bytes`: of one token, inside of a layer; `logits_bytes`: of one token, from an
    output part that is not on the head (0: not known). `layer_kinds`: of each layer, which of `kinds` those of
    `tensor_bytes` are, in that order, and then its stacks of experts (empty: not known).
    """

    name: str
    layer_bytes: tuple[Size, ...]
    input_bytes: Size
    output_bytes: Size
    kv_bytes_per_token_layer: Size
    context_length: Size
    kv_type: KvType = KvType.F16
    layer_types: dict[str, tuple[Size, ...]] = {}
    input_types: dict[str, Size] = {}
    output_types: dict[str, Size] = {}
    largest_tensor_bytes: Size = 0
    input_row_bytes: Size = 0
    activation_bytes: Size = 0
    row_bytes: Size = 0
    expert_bytes: tuple[Size, ...] = ()
    n_experts: Size = 0
    n_experts_used: Size = 0
    tensor_bytes: tuple[Annotated[tuple[Size, ...], Meta(max_length=MAX_TENSORS)], ...] = ()
    logits_bytes: Size = 0
    kinds: Annotated[tuple[TensorKind, ...], Meta(max_length=MAX_KINDS)] = ()
    layer_kinds: tuple[Annotated[tuple[Size, ...], Meta(max_length=2 * MAX_TENSORS)], ...] = ()

    def __post_init__(self) -> None:
        for name, sizes in self.layer_types.items():
            if len(sizes) != self.n_layers:
                raise ValueError(f"layer_types has {len(sizes)} sizes for {name}, the model {self.n_layers} layers")
        self._check_tensors()
        self._check_kinds()
        self._check_experts()

    def _check_tensors(self) -> None:
        if self.tensor_bytes and len(self.tensor_bytes) != self.n_layers:
            raise ValueError(f"tensor_bytes is for {len(self.tensor_bytes)} layers, the model has {self.n_layers}")
        if any(sum(sizes) > whole for sizes, whole in zip(self.tensor_bytes, self.layer_bytes, strict=False)):
            raise ValueError("tensor_bytes says more than layer_bytes")

    def _check_kinds(self) -> None:
        if not self.layer_kinds:
            return
        if not len(self.layer_kinds) == len(self.tensor_bytes) == self.n_layers:
            raise ValueError("layer_kinds and tensor_bytes have to be there for all layers")
        for numbers, sizes in zip(self.layer_kinds, self.tensor_bytes, strict=True):
            if any(number >= len(self.kinds) for number in numbers):
                raise ValueError(f"layer_kinds names one of {len(self.kinds)} kinds that is not there")
            if tuple(self.kinds[number].n_bytes for number in numbers[: len(sizes)]) != sizes:
                raise ValueError("layer_kinds and tensor_bytes say different sizes")

    def _check_experts(self) -> None:
        if not self.expert_bytes:
            return
        if len(self.expert_bytes) != self.n_layers:
            raise ValueError(f"expert_bytes has {len(self.expert_bytes)} sizes, the model {self.n_layers} layers")
        if any(part > whole for part, whole in zip(self.expert_bytes, self.layer_bytes, strict=True)):
            raise ValueError("expert_bytes says more than layer_bytes")
        if not 1 <= self.n_experts_used <= self.n_experts:
            raise ValueError(f"a token goes through {self.n_experts_used} of {self.n_experts} experts")

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the output matrix; so it is taken to be where that is not known."""
        return not self.input_row_bytes


class DeviceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device of a node; `copies` and the first fields are those of `interfaces.Device`.

    Measured, 0 where it is not known: `decode_bytes_s`, weight bytes that it goes through in a second when it computes
    one token, and `prefill_bytes_s`, weight bytes times tokens where many tokens go through together. `rates` say it
    more closely, for each type of weights that was measured and for `OUTPUT`. Bytes are those in the file.
    `copy_bytes_s`: how fast weights come from memory to a device that `copies`, laid out as it wants them.
    """

    id: Name
    memory_bytes: Size
    shares_host: bool = True
    growth: dict[str, float] = {}
    decode_bytes_s: Rate = 0.0
    prefill_bytes_s: Rate = 0.0
    copies: bool = False
    rates: TypeRates = {}
    copy_bytes_s: Rate = 0.0

    def __post_init__(self) -> None:
        for name, factor in self.growth.items():
            if not 1 <= factor <= MAX_GROWTH:
                raise ValueError(f"growth of {name} is from 1 to {MAX_GROWTH:g}, not {factor:g}")
        check_rates(self.rates)

    @classmethod
    def of(cls, device: Device) -> DeviceFacts:
        return cls(device.id, device.memory_bytes, device.shares_host, dict(device.growth), copies=device.copies)


class NodeFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node: how many bytes of its host's memory it may use for weights and KV, and its devices, best first.

    `disk_bytes_s`: of large reads of the model's file past the page cache (0: not known; weights may be streamed all
    the same, only no time is foretold then). Nodes that name the same `disk` share its rate; "": a disk of its own.
    `random_bytes_s`: the same of pieces of RANDOM_BYTES from anywhere in the file (0: as of large reads).
    """

    name: Name
    memory_bytes: Size
    devices: tuple[DeviceFacts, ...] = ()
    disk_bytes_s: Rate = 0.0
    disk: Name = ""
    random_bytes_s: Rate = 0.0

    def __post_init__(self) -> None:
        _check_once("device", (device.id for device in self.devices))

    @property
    def places(self) -> tuple[DeviceFacts, ...]:
        """Its devices; where none is stated, a nameless one that has all of the memory."""
        return self.devices or (DeviceFacts("", self.memory_bytes),)

    @property
    def streaming_device(self) -> DeviceFacts | None:
        """The device whose weights may be streamed: the last that shares the host's memory, which is its CPU; without
        one, the last that copies weights, to slots in its own memory."""
        last_first = self.places[::-1]
        of_host = next((device for device in last_first if device.shares_host), None)
        return of_host or next((device for device in last_first if device.copies), None)

    @property
    def room_bytes(self) -> int:
        """What it can hold on all devices: the memory of those that have their own, and the host's for the others."""
        shared = sum(device.memory_bytes for device in self.places if device.shares_host)
        own = sum(device.memory_bytes for device in self.places if not device.shares_host)
        return own + min(shared, self.memory_bytes)


class LinkFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The way from `source` to `target`, each a node's name or "" for any: how long a message of no length takes, and
    how many bytes go in a second (0, which no problem file says: as many as you like)."""

    source: Name = ""
    target: Name = ""
    latency_s: Seconds = 0.0
    bytes_s: Rate = 0.0

    def time_s(self, n_bytes: float) -> float:
        return self.latency_s + (n_bytes / self.bytes_s if self.bytes_s else 0.0)


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Assign the layers of `model` to `nodes`. The node `head` runs the input part, and the output part where a plan
    names no other node for it: `output` is the one that is asked about.

    `kv_tokens` is how many KV positions, over all sequences, every visited node must have room for. `links`: the first
    that fits a pair of nodes counts, none: no time. `rounds`: how many times the user wants every node visited in a
    pass (0: the solver's choice). `streaming`: whether weights that do not fit may be read from disk in every pass.

    `goal`: what the plan is for. `width`: for latency the tokens that go through together (of a batch, or guessed ones
    of a sequence), for throughput the sequences that are served at once. `n_past`: KV positions that a token looks back
    on. `n_prompt`: tokens of a prompt, of which `chunk` are computed in a step (0: as `chunk_of` has it).
    """

    model: ModelFacts
    nodes: tuple[NodeFacts, ...]
    head: Name
    kv_tokens: Size
    links: tuple[LinkFacts, ...] = ()
    rounds: Annotated[int, Meta(ge=0, le=MAX_ROUNDS)] = 0
    streaming: bool = True
    goal: Goal = Goal.LATENCY
    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)] = 1
    n_past: Size = 0
    n_prompt: Annotated[int, Meta(ge=1, le=2**32 - 1)] = PROMPT_TOKENS
    chunk: Annotated[int, Meta(ge=0, le=MAX_WIDTH)] = 0
    output: Name = ""

    def __post_init__(self) -> None:
        _check_once("node", (node.name for node in self.nodes))
        known = {"", *(node.name for node in self.nodes)}
        for name in (name for link in self.links for name in (link.source, link.target)):
            if name not in known:
                raise ValueError(f"a link ends at {name!r}, which is no node")

    def link(self, source: str, target: str) -> LinkFacts:
        """The way between two nodes; none where they are the same."""
        fitting = (link for link in self.links if link.source in ("", source) and link.target in ("", target))
        return next(fitting, LinkFacts()) if source != target else LinkFacts()

    def node(self, name: str) -> NodeFacts:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes) or "none"
        raise PlanError(f"node {name!r} is not in the cluster", hint=f"the nodes are: {known}")

    @property
    def output_node(self) -> str:
        return self.output or self.head

    @property
    def outputs(self) -> tuple[str, ...]:
        """Nodes that may have the output part, the head before the others. One where that is what is asked about, or
        where it is not known how large logits are."""
        others = (node.name for node in self.nodes if node.name != self.head)
        return (self.head, *others) if not self.output and self.model.logits_bytes else (self.output_node,)

    def with_output(self, name: str) -> Problem:
        """Asked about plans with the output part on that node ("": the head). Raises PlanError if there is none."""
        self.node(name or self.head)
        name = "" if name == self.head else name
        return self if name == self.output else msgspec.structs.replace(self, output=name)

    def fixed_bytes(self, name: str) -> int:
        """Bytes that a node needs besides its layers: of the ends of the model that it has, on their device."""
        device = self.device_of_ends(name)
        return 0 if device is None else self._end_bytes(name, device)

    def fixed_bytes_on(self, name: str, device: str) -> int:
        """The same of one of its devices."""
        own = self.device_of_ends(name)
        return 0 if own is None or own.id != device else self._end_bytes(name, own)

    def table_bytes(self, name: str) -> int:
        """The part of them that is an embedding of which only the rows of tokens are read."""
        looks_up = name == self.head and (name != self.output_node or not self.model.is_tied)
        return self.model.input_bytes if looks_up else 0

    @property
    def end_device(self) -> DeviceFacts:
        """Where the input part lies, and the output part if it is on the head."""
        return self._place_of_ends(self.head)

    @property
    def output_device(self) -> DeviceFacts:
        return self._place_of_ends(self.output_node)

    def device_of_ends(self, name: str) -> DeviceFacts | None:
        """Where the ends of the model lie that a node has; None: it has none."""
        return self._place_of_ends(name) if name in (self.head, self.output_node) else None

    def _place_of_ends(self, name: str) -> DeviceFacts:
        """The node's first device that has room for them, else where they may be streamed, its `streaming_device`, else
        its first."""
        node = self.node(name)
        for device in node.places:
            room = min(device.memory_bytes, node.memory_bytes) if device.shares_host else device.memory_bytes
            if self._end_bytes(name, device) <= room:
                return device
        return (node.streaming_device if self.streaming else None) or node.places[0]

    def _end_bytes(self, name: str, device: DeviceFacts) -> int:
        """A tied matrix is once on a node, and on both where these are two."""
        model, total = self.model, 0
        if name == self.head or model.is_tied:
            total += model.input_bytes + _growth(model.input_types, device.growth)
        if name == self.output_node:
            total += model.output_bytes + _growth(model.output_types, device.growth)
        return total

    def layers_bytes(self, start: int, stop: int) -> int:
        """Weights, as large as in the file, and KV of a run of layers."""
        kv = self.model.kv_bytes_per_token_layer * self.kv_tokens * (stop - start)
        return sum(self.model.layer_bytes[start:stop]) + kv

    def weight_bytes(self, device: DeviceFacts) -> list[int]:
        """Of every layer of the model, as large as it is on this device."""
        types = {name: sizes for name, sizes in self.model.layer_types.items() if name in device.growth}
        if not types:
            return list(self.model.layer_bytes)
        return [
            in_file + _growth({name: sizes[layer] for name, sizes in types.items()}, device.growth)
            for layer, in_file in enumerate(self.model.layer_bytes)
        ]


def check_rates(rates: Mapping[str, Widths]) -> None:
    """Raises ValueError where widths are not in order."""
    for name, widths in rates.items():
        if any(one >= other for (one, _), (other, _) in pairwise(widths)):
            raise ValueError(f"the rates of {name} are to have ascending widths")


def _check_once(what: str, names: Iterable[str]) -> None:
    names = tuple(names)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is there twice")


def _growth(types: Mapping[str, int], growth: Mapping[str, float]) -> int:
    """Bytes that tensors of these types take on a device beyond those in the file."""
    return sum(math.ceil(n_bytes * (growth.get(name, 1.0) - 1.0)) for name, n_bytes in types.items())


def problem_to_json(problem: Problem) -> bytes:
    return msgspec.json.format(msgspec.json.encode(problem), indent=2)


class _StatedLink(msgspec.Struct):
    bytes_s: float | None = None


class _Stated(msgspec.Struct):
    """What a file says itself of links: none and 0 are not the same."""

    links: tuple[_StatedLink, ...] = ()


def problem_from_json(data: bytes) -> Problem:
    """Raises PlanError naming the field when `data` is not a problem, or a link of it carries nothing."""
    try:
        problem = msgspec.json.decode(data, type=Problem)
        stated = msgspec.json.decode(data, type=_Stated)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(
            f"not a problem file: {error}", hint="`problem_to_json` of prima_core.plan.problem writes one"
        ) from error
    for link, own in zip(problem.links, stated.links, strict=True):
        if own.bytes_s == 0:
            ends = f"from {link.source or 'any node'} to {link.target or 'any node'}"
            hint = "state what it carries, leave bytes_s out where that does not matter, or leave out the node"
            raise PlanError(f"the link {ends} has a bandwidth of 0 bytes per second: nothing gets through", hint=hint)
    return problem
