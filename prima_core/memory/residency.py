"""Which weights of a node stay in memory and which are read from disk in every pass: pure, the same answer twice.

What costs nothing to leave out goes first: the table of token embeddings, of which a pass looks up a row per token (one
or two pages through the map). Then experts: a token needs a few of them, often those of the tokens before it. Then
whole tensors of the layers, each layer about the same share of its bytes, so that its own compute hides as much reading
as possible. Last the output matrix, in blocks of rows. Norms, biases, routers and whatever else is small always stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from prima_core.interfaces import Layers
from prima_core.model.header import TensorInfo
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD, layer_tensor

SMALLEST_BYTES = 64 * 1024
"""A tensor below this costs more as a read of its own than it takes as memory."""
BLOCK_BYTES = 16 * 1024 * 1024
"""About the size of the runs of rows in which the output matrix is streamed: four reads of the usual size."""
PIECE_BYTES = 32 * 1024 * 1024
"""Of a streamed output, which is larger than any matrix of a layer, no more is on a device at once."""
_ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node holds. `layers`: by layer in the order of the visits, its tensors that may be streamed and their
    bytes; `blocks`: bytes of the output matrix' runs of rows; `table_bytes`: token embeddings that are looked up only;
    `fixed_bytes`: what always stays; `experts`: as `layers`, the stacks of experts."""

    layers: Mapping[int, Mapping[str, int]]
    blocks: tuple[int, ...] = ()
    block_rows: int = 0
    output: str = ""
    table_bytes: int = 0
    fixed_bytes: int = 0
    experts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        return sum(sum(sizes.values()) for sizes in self.experts.values())

    @property
    def layer_bytes(self) -> int:
        return sum(sum(sizes.values()) for sizes in self.layers.values())

    @property
    def streamable_bytes(self) -> int:
        """The most that can be left out of memory."""
        return self.table_bytes + self.expert_bytes + self.layer_bytes + sum(self.blocks)

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.streamable_bytes

    def streamed_bytes(self, streamed: Streamed) -> int:
        """What is not kept in memory."""
        layers = sum(self.layers[layer][name] for layer, names in streamed.layers.items() for name in names)
        blocks = sum(self.blocks[len(self.blocks) - streamed.n_blocks :])
        return layers + blocks + streamed.expert_bytes + (self.table_bytes if streamed.table else 0)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What is not kept in memory: names by layer, the last `n_blocks` blocks of the output, the table or not, and so
    many bytes of the experts. `on_demand`: each expert is read when a token chooses it; once so, always so."""

    layers: Mapping[int, frozenset[str]] = field(default_factory=dict)
    n_blocks: int = 0
    table: bool = False
    expert_bytes: int = 0
    on_demand: bool = False


def holding(tensors: Mapping[str, TensorInfo], visits: Sequence[Layers], ends: Sequence[str]) -> Holding:
    """Of a node that is visited for `visits` in this order in each pass, with the end tensors `ends`."""
    of_layers = {layer: _of_layer(tensors, layer) for visit in visits for layer in visit}
    layers = {layer: {info.name: info.n_bytes for info in of if _may_stream(info)} for layer, of in of_layers.items()}
    output = _output(tensors, ends)
    rows, blocks = _cut(tensors[output]) if output else (0, ())
    table_bytes = tensors[TOKEN_EMBD].n_bytes if TOKEN_EMBD in ends and output != TOKEN_EMBD else 0
    experts = {layer: {info.name: info.n_bytes for info in of if _is_stack(info)} for layer, of in of_layers.items()}
    stacks = {layer: sizes for layer, sizes in experts.items() if sizes}
    found = Holding(layers, blocks, rows, output, table_bytes, experts=stacks)
    total = sum(info.n_bytes for of in of_layers.values() for info in of) + sum(tensors[name].n_bytes for name in ends)
    return replace(found, fixed_bytes=total - found.streamable_bytes)


def part_of(held: Holding, streamed: Streamed) -> Holding:
    """The same of which no more than this may be left out of memory; of experts and of the output all or nothing."""
    layers = {
        layer: {name: size for name, size in sizes.items() if name in streamed.layers[layer]}
        for layer, sizes in held.layers.items()
    }
    part = replace(
        held,
        layers=layers,
        blocks=held.blocks if streamed.n_blocks else (),
        output=held.output if streamed.n_blocks else "",
        table_bytes=held.table_bytes if streamed.table else 0,
        experts=held.experts if streamed.on_demand else {},
    )
    return replace(part, fixed_bytes=held.total_bytes - part.streamable_bytes)


def resized(held: Holding, now: Streamed, streamed_bytes: int) -> Streamed:
    """What to leave out of memory instead of `now`, most of which is the same: at least so many bytes and few more, or
    all that can be."""
    rest = max(0, streamed_bytes - held.table_bytes)
    from_experts = min(rest, held.expert_bytes)
    rest -= from_experts
    from_layers = min(rest, held.layer_bytes)
    return Streamed(
        _resized_layers(held.layers, now.layers, from_layers),
        _blocks_with(held.blocks, rest - from_layers),
        table=streamed_bytes > 0 and held.table_bytes > 0,
        expert_bytes=from_experts,
        on_demand=now.on_demand or from_experts > 0,
    )


def _resized_layers(
    layers: Mapping[int, Mapping[str, int]], now: Mapping[int, frozenset[str]], wanted: int
) -> dict[int, frozenset[str]]:
    streamed = {layer: now.get(layer, frozenset()) for layer in layers}
    inside = [{name: sizes[name] for name in streamed[layer]} for layer, sizes in layers.items()]
    missing = wanted - sum(sum(sizes.values()) for sizes in inside)
    if missing <= 0:
        return dict(zip(layers, spread(inside, wanted), strict=True))
    outside = [
        {name: size for name, size in sizes.items() if name not in streamed[layer]} for layer, sizes in layers.items()
    ]
    added = spread(outside, missing)
    return {layer: streamed[layer] | more for layer, more in zip(layers, added, strict=True)}


def spread(layers: Sequence[Mapping[str, int]], wanted: int) -> list[frozenset[str]]:
    """Names from each layer, of at least `wanted` bytes in all (which must be there), the same share of each layer.

    What a layer gives more than its share is taken off the next one's, so that only the last one's is too much.
    """
    total = sum(sum(sizes.values()) for sizes in layers)
    chosen: list[frozenset[str]] = []
    seen = done = 0
    for sizes in layers:
        seen += sum(sizes.values())
        names = _least_cover(sizes, -(-wanted * seen // total) - done) if total else frozenset[str]()
        done += sum(sizes[name] for name in names)
        chosen.append(names)
    return chosen


def _least_cover(sizes: Mapping[str, int], need: int) -> frozenset[str]:
    """The names with the least sum that is at least `need`; the fewest among equal ones. A family's layer has a dozen
    large tensors at most, many of the same size: few sums."""
    if need <= 0:
        return frozenset()
    sums: dict[int, tuple[str, ...]] = {0: ()}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        for total, names in list(sums.items()):
            known = sums.get(total + size)
            if known is None or len(known) > len(names) + 1:
                sums[total + size] = (*names, name)
    return frozenset(sums[min(total for total in sums if total >= need)])


def _blocks_with(blocks: Sequence[int], wanted: int) -> int:
    """How many of the last blocks hold so many bytes."""
    n_blocks = 0
    while wanted > 0 and n_blocks < len(blocks):
        n_blocks += 1
        wanted -= blocks[-n_blocks]
    return n_blocks


def _of_layer(tensors: Mapping[str, TensorInfo], layer: int) -> list[TensorInfo]:
    prefix = layer_tensor(layer, "")
    return [info for name, info in tensors.items() if name.startswith(prefix)]


def _may_stream(info: TensorInfo) -> bool:
    return info.n_bytes >= SMALLEST_BYTES and len(info.shape) == 2 and not info.name.endswith(_ROUTER)


def _is_stack(info: TensorInfo) -> bool:
    """Whether it holds a matrix of each expert."""
    return len(info.shape) == 3


def _output(tensors: Mapping[str, TensorInfo], ends: Sequence[str]) -> str:
    """The output matrix among the ends; a tied one is the table of embeddings."""
    if OUTPUT_NORM not in ends:
        return ""
    name = OUTPUT if OUTPUT in ends else TOKEN_EMBD
    return name if _may_stream(tensors[name]) else ""


def _cut(info: TensorInfo) -> tuple[int, tuple[int, ...]]:
    """Rows of a block, a multiple of 64 (kernels take rows in groups), and the bytes of each block."""
    n_rows = info.shape[0]
    row_bytes = info.n_bytes // n_rows
    rows = min(n_rows, max(1, BLOCK_BYTES // row_bytes // 64) * 64)
    return rows, tuple(min(rows, n_rows - start) * row_bytes for start in range(0, n_rows, rows))
