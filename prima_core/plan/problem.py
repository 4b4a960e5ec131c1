"""What a solver is asked: the model and the nodes as numbers. Pure data with a JSON round trip."""

from __future__ import annotations

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import KvType


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a model. `layer_bytes` has one entry per decoder layer; `input_bytes` is the token embedding,
    `output_bytes` the final norm and the output matrix (0 where it is tied to the embedding).

    `context_length` is that of the longest sequence that is served, `kv_type` what its K and V are kept in.
    """

    name: str
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    kv_bytes_per_token_layer: int
    context_length: int
    kv_type: KvType = KvType.F16

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)


class NodeFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node: how many bytes it may use for weights and KV, and its devices (ids, best first)."""

    name: str
    memory_bytes: int
    devices: tuple[str, ...] = ()


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Assign the layers of `model` to `nodes`. The node `head` runs the input and the output part.

    `kv_tokens` is how many KV positions, over all sequences, every visited node must have room for.
    """

    model: ModelFacts
    nodes: tuple[NodeFacts, ...]
    head: str
    kv_tokens: int

    def node(self, name: str) -> NodeFacts:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise PlanError(f"node {name!r} is not in the cluster", hint=f"the nodes are: {known}")

    def fixed_bytes(self, name: str) -> int:
        """Bytes that a node needs besides its layers: the input and output part on the head."""
        return self.model.input_bytes + self.model.output_bytes if name == self.head else 0

    def layers_bytes(self, start: int, stop: int) -> int:
        """Weights and KV of a run of layers."""
        kv = self.model.kv_bytes_per_token_layer * self.kv_tokens * (stop - start)
        return sum(self.model.layer_bytes[start:stop]) + kv


def problem_to_json(problem: Problem) -> bytes:
    return msgspec.json.format(msgspec.json.encode(problem), indent=2)


def problem_from_json(data: bytes) -> Problem:
    """Raises PlanError naming the field when `data` is not a problem."""
    try:
        return msgspec.json.decode(data, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(
            f"not a problem file: {error}", hint="`problem_to_json` of prima_core.plan.problem writes one"
        ) from error
