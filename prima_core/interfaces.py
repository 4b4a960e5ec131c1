"""What the parts of prima are to each other: descriptors that plugins hand out, and Protocols behind them.

Nothing here computes, reads or sends. A plugin author needs this file and `hookspecs.py` only.
Shapes are in comments as `[rows, columns]`; ranges are half-open; sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.model.quant import GGUFType
    from prima_core.model.spec import ModelSpec
    from prima_core.plan.plan import Plan
    from prima_core.plan.problem import Problem

API = 1
"""Version of the hooks and Protocols. A plugin writes the number it was made for; another number is refused."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, order=True)
class Layers:
    """Half-open range of decoder layers."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


# ---------------------------------------------------------------- steps: what goes through the model


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` consecutive tokens of one sequence, the first at position `start`. Its rows are consecutive."""

    sequence: int
    start: int
    count: int


class KvKind(StrEnum):
    OPEN = "open"
    FORK = "fork"
    MOVE = "move"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class KvOp:
    """A change of the KV cache that travels inside a step and applies, before the step's tokens, to the visited layers.

    open(sequence, capacity): room for `capacity` positions, empty.
    fork(sequence, source, length, capacity): as open, with the first `length` positions of `source` copied.
    move(sequence, source, length, capacity): as fork, and `source` is dropped; where the capacity stays nothing need be
    copied. `source` may be `sequence` itself: then its room gets another capacity, or only forgets what is behind
    `length`.
    drop(sequence): the room is given back; idempotent.
    """

    kind: KvKind
    sequence: int
    length: int = 0
    capacity: int = 0
    source: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens of one or more sequences that go through the model together: rows in the order of `chunks`.

    `tokens` holds the ids of all rows where the input part runs; elsewhere it is empty (workers see only activations).
    """

    chunks: tuple[Chunk, ...]
    kv: tuple[KvOp, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


# ---------------------------------------------------------------- weights

ExpertGroup = tuple["NDArray[np.intp]", "NDArray[np.intp]"]
"""Experts, and for each of them which matrix of `Weight.data` is its own."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor as it lies in the file: `data` is a flat read-only uint8 view into the map, nothing is copied.

    `shape` is in numpy order: a matrix is [rows = outputs, columns = inputs] and each row is a run of whole blocks.
    """

    name: str
    type: GGUFType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    require: Callable[[NDArray[np.intp]], Iterator[ExpertGroup]] | None = None
    """Of a stack of experts whose matrices come from disk when they are needed; None: all are there, in order.

    `require(chosen)` gives the experts that were chosen, as often as tokens chose them, in groups, each expert once.
    The matrices of a group stay in the same places of all stacks of the layer (one call serves gate, up and down) until
    the next group is asked for, or none is any more. Raises ModelError when the file cannot be read.
    """
    places: int = 0
    """How many matrices `data` has room for, where they come when they are needed."""

    def part(self, start: int, stop: int) -> Weight:
        """Entries [start, stop) along the first axis, a view: some rows of a matrix, some matrices of a stack; where
        they come when they are needed, those of these places."""
        size = len(self.data) // (self.places or self.shape[0])
        data = self.data[start * size : stop * size]
        return replace(self, shape=(stop - start, *self.shape[1:]), data=data, require=None, places=0)


class Store(Protocol):
    """The weights of a slice. `acquire` waits until a layer's tensors are in memory, `release` lets them go.

    Calls come from one thread. Layers are best acquired in the order of the plan's visits, again and again: that is the
    order in which a store that streams reads ahead.
    """

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        """The layer's tensors by name without the `blk.N.` prefix, e.g. `attn_q.weight`.

        The same mapping object as last time means the same bytes at the same place; views of another mapping are valid
        until the layer is released. Raises ModelError when the file cannot be read.
        """
        ...

    def release(self, layer: int) -> None: ...

    def views(self, layer: int) -> Mapping[str, Weight]:
        """As `acquire`, but in memory or not: for types and sizes."""
        ...

    def give_back(self, weights: Iterable[Weight]) -> None:
        """Their bytes were copied to a device: the memory here may go to others. Reading them again takes the disk."""
        ...

    def shared(self) -> Mapping[str, Weight]:
        """Tensors outside the layers by full name: `token_embd.weight`, `output_norm.weight`, ..."""
        ...

    def is_streamed(self, name: str) -> bool:
        """Whether a tensor, by its full name, is not kept in memory between passes."""
        ...

    def blocks(self, name: str) -> Iterator[Weight]:
        """A tensor of `shared` as runs of its rows in order, each valid until the next is asked for: a streamed one may
        be larger than the memory that it passes through. One that stays is a single run."""
        ...

    def close(self) -> None: ...


# ---------------------------------------------------------------- backends


class KvType(StrEnum):
    """What K and V are kept in. Q8_0: runs of 32 int8 with an f16 scale, as in GGUF."""

    F16 = "f16"
    Q8_0 = "q8_0"
    F32 = "f32"


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a model that a device gets: layer ranges (one per visit), and whether the ends of the model too.

    `context`: positions that a sequence may reach, which some RoPE scalings depend on; 0: the model's own. `kv_tokens`:
    KV positions, over all sequences, that the plan has room for; 0: not known.
    """

    layers: tuple[Layers, ...]
    has_input: bool = False
    has_output: bool = False
    kv_type: KvType = KvType.F16
    context: int = 0
    kv_tokens: int = 0


MAX_GROWTH = 64.0
"""Above 32, which is what the most compressed type would take as floats."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that computes. `id` is backend:device, e.g. `numpy:cpu`, `torch:cuda:0`.

    `memory_bytes`: what weights and KV may take there now. `shares_host`: this memory is the host's (a CPU's, unified
    memory), so what lies there counts against the node's memory too. `growth`: types of tensors, by name, that take
    more bytes there than in the file, and how many times as many, from 1 to MAX_GROWTH. `copies`: weights are copied
    there, not used where they were read, so that streamed ones take room both in the host's buffer and there.
    """

    id: str
    memory_bytes: int
    summary: str = ""
    shares_host: bool = True
    growth: Mapping[str, float] = field(default_factory=dict, hash=False)
    copies: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """Answer of a backend to "would you work on this machine?"; `hint` says how to get what is missing.

    `cpu_only`: it has nothing but the CPU here, for which numpy is there, so that `--backend auto` need not open it:
    to import a library can take seconds. `wrong_setting`: the user asked of it, outside of `BackendOptions`, for what
    cannot be: an error, which `auto` does not evade by another backend.
    """

    usable: bool
    reason: str = ""
    hint: str = ""
    cpu_only: bool = False
    wrong_setting: bool = False


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the user chose for a backend. `threads` 0: its own choice. `kernels`: "auto" or names of its own."""

    threads: int = 0
    kernels: str = "auto"


@runtime_checkable
class Shard(Protocol):
    """Owns weights and KV of a slice; knows no network. All calls come from the owner thread of the backend.

    Activations at this border are plain host arrays, [n_tokens, d_model] float32.
    """

    def embed(self, step: Step) -> NDArray[np.float32]:
        """Token embeddings of `step.tokens`. Only on a shard loaded with `has_input`."""
        ...

    def run(self, layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        """Apply `step.kv` to `layers`, write K and V at the chunks' positions, return the activation after `layers`."""
        ...

    def logits(self, activation: NDArray[np.float32], rows: Sequence[int]) -> NDArray[np.float32]:
        """[len(rows), vocab_size] of the given rows. Only on a shard loaded with `has_output`."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One per process; one owner thread calls `load`, the shards and `close`."""

    def devices(self) -> Sequence[Device]: ...

    def describe(self) -> Mapping[str, str]:
        """Facts for `prima doctor`, e.g. {"kernels": "native", "threads": "2"}."""
        ...

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        """Raises DeviceMemoryError when the slice does not fit (`arch.fits.check_fits` says it, and how many layers
        would), ModelError for a family or type it lacks."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class BackendPlugin:
    """Offer of a backend. `extra`: the pip extra of its dependency. `probe` and `open` may import heavy things."""

    name: str
    api: int
    probe: Callable[[], Probe]
    open: Callable[[BackendOptions], Backend]
    extra: str | None = None


# ---------------------------------------------------------------- transports


@dataclass(frozen=True, slots=True)
class Credentials:
    """The cluster's secret, from which a transport derives its keys. None: no secret (inproc, tests)."""

    secret: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a link: longest message in bytes, and how many messages may wait on either side."""

    max_message_bytes: int = 64 * 1024 * 1024
    max_queued: int = 16


class ReceiveLink(Protocol):
    """Messages from any number of peers; the order of each peer's messages is kept. Raises LinkError kinds only."""

    @property
    def address(self) -> str:
        """The bound address, with the real port; another process can dial it."""
        ...

    def receive(self, timeout_s: float) -> memoryview:
        """The next message. Raises LinkTimeout, LinkClosed, LinkBroken."""
        ...

    def close(self) -> None:
        """Idempotent; may be called from any thread; a waiting `receive` ends with LinkClosed soon."""
        ...


class SendLink(Protocol):
    """Messages to one peer, in order. A message that was sent may still be lost when the peer dies."""

    @property
    def peer(self) -> str: ...

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        """Send the parts as one message. Raises LinkTimeout (nothing was sent), LinkClosed, LinkBroken."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """Moves bytes; never looks into a message. Addresses are `scheme://...`."""

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> ReceiveLink: ...

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> SendLink:
        """Returns at once; the peer may come later. Raises LinkBroken for an address that can never work."""
        ...


@dataclass(frozen=True, slots=True)
class TransportPlugin:
    """Offer of a transport, chosen by the scheme of an address."""

    scheme: str
    api: int
    open: Callable[[], Transport]
    summary: str = ""


# ---------------------------------------------------------------- solvers


class Goal(StrEnum):
    """What is to be least. `LATENCY`: the time of a pass, which gives each sequence in it a token. `THROUGHPUT`: the
    time in which every sequence gets a token while many are served, which keep several nodes busy at once. `TTFT`: the
    time to the first token of a prompt."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    TTFT = "ttft"


@dataclass(frozen=True, slots=True)
class SolverPlugin:
    """Offer of a solver: `solve` is pure (no I/O, no clock, the same answer twice); core checks its plan.

    `needs_rates`: its plans depend on how fast nodes are also where everything fits in memory, so that a head measures
    itself, once, before it makes one. Rates may be unknown (0) all the same.
    """

    name: str
    api: int
    summary: str
    solve: Callable[[Problem], Plan]
    needs_rates: bool = False
