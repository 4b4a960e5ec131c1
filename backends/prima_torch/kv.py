"""The KV cache in pages of 64 positions, so that sequences come, grow and go without moving what stands.

Every layer has arrays of its own, but layers that have seen the same steps share their bookkeeping: which pages a
sequence has, and how far it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from prima_core.arch.kvsteps import check_step, spans
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_core.model.quant import BLOCKS, GGUFType, kv_row_bytes
from prima_torch.memory import give_back, room_for

PAGE = 64
"""Positions of a page."""
SLACK_PAGES = 8
"""More than `Slice.kv_tokens` asks for, because a sequence's last page is rarely full."""
COPIED_PAGES = 64
"""Of a sequence, at once: some MB in each layer."""
SHORTEST = 256
"""Positions of the smallest table of pages."""
SMALLEST = 1e-30
"""Values all below this become 0 in Q8_0: 127 / largest could overflow."""
RUN = BLOCKS[GGUFType.Q8_0].n_weights
"""Values that share a scale in Q8_0."""

_ELEMENTS: Mapping[KvType, torch.dtype] = MappingProxyType(
    {KvType.F32: torch.float32, KvType.F16: torch.float16, KvType.Q8_0: torch.int8}
)
PageNumbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Half:
    """K or V of a layer. `values`: [pages, PAGE, n_kv_heads, head_dim], f32, f16 or int8; with int8 `scales` f16
    [pages, PAGE, n_kv_heads, head_dim / 32]."""

    values: torch.Tensor
    scales: torch.Tensor | None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LayerKv:
    k: Half
    v: Half


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where a pass writes and what it may see, on the device.

    `slots`, i64 [n_tokens]: page * PAGE + offset of each row. `table`, i32 [chunks, pages]: the pages of each chunk's
    sequence, in order. `lengths`, i32 [chunks]: positions that the chunk's last row may see, its own included.
    """

    slots: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The same on the host, where `pages` of a chunk are only those that its last row may see."""

    slots: NDArray[np.int64]
    pages: tuple[PageNumbers, ...]
    lengths: NDArray[np.int32]

    def inputs(self, width: int, device: torch.device) -> Inputs:
        """On the device, by one copy. `width`: pages of the table."""
        lengths_at = -(-len(self.slots) // 2) * 4  # in i32; each part begins at a multiple of 16 bytes
        table_at = lengths_at + -(-len(self.lengths) // 4) * 4
        host = np.zeros(-(-(table_at + len(self.pages) * width) // 2), np.int64)
        host[: len(self.slots)] = self.slots
        host.view(np.int32)[lengths_at : lengths_at + len(self.lengths)] = self.lengths
        for i, pages in enumerate(self.pages):
            start = table_at + i * width
            host.view(np.int32)[start : start + len(pages)] = pages
        placed = torch.from_numpy(host).to(device)
        ints = placed.view(torch.int32)
        table = ints[table_at : table_at + len(self.pages) * width].view(-1, width)
        return Inputs(placed[: len(self.slots)], table, ints[lengths_at : lengths_at + len(self.lengths)])


@dataclass(frozen=True, slots=True)
class Pass:
    """What attention needs. `spans`: row start, row stop and chunk. `decodes`: every row is a sequence of its own.

    `longest`: no sequence is longer, in positions; a power of two, so that there are few kinds of passes. `pages`: by
    layer; the same object means the same arrays. `rows`: by layer, what `inputs` are made of, or nothing where those
    are given.
    """

    spans: tuple[tuple[int, int, Chunk], ...]
    decodes: bool
    longest: int
    pages: Mapping[int, LayerKv]
    rows: Mapping[int, Rows]
    _device: torch.device
    _made: dict[int, Inputs]  # by id of the rows

    def inputs(self, layer: int) -> Inputs:
        """Uploaded when first asked for; layers that share rows share these."""
        if not self.rows:
            return self._made[0]
        rows = self.rows[layer]
        if id(rows) not in self._made:
            self._made[id(rows)] = rows.inputs(self.longest // PAGE, self._device)
        return self._made[id(rows)]

    def common_rows(self) -> Rows | None:
        """Those of all layers, unless layers have different pages because they have not seen the same steps."""
        first, *others = self.rows.values()
        return first if all(rows is first for rows in others) else None

    def with_inputs(self, slots: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, longest: int) -> Pass:
        """A pass that reads these instead, whatever they hold when it is computed."""
        return replace(self, longest=longest, rows={}, _made={0: Inputs(slots, table, lengths)})


@dataclass(frozen=True, slots=True)
class Room:
    """What a sequence has in each layer of a group; positions [0, length) have been written and may be read."""

    pages: PageNumbers
    length: int
    capacity: int

    def is_like(self, other: Room) -> bool:
        return (self.length, self.capacity) == (other.length, other.capacity) and np.array_equal(
            self.pages, other.pages
        )


class TorchKv:
    """`KvCache` on a torch device. Raises ModelError for heads that are no whole blocks of the type.

    Positions count as written from `begin` on.
    """

    def __init__(self, part: Slice, n_kv_heads: int, head_dim: int, device: torch.device) -> None:
        kv_row_bytes(part.kv_type, head_dim)
        pages = partial(_no_pages, part.kv_type, n_kv_heads, head_dim, device)
        self._groups = [
            _Group(device, {layer: LayerKv(pages(), pages()) for layer in layers}) for layers in part.layers if layers
        ]
        self._device = device
        if part.kv_tokens:
            for group in self._groups:
                group.grow(_n_pages(part.kv_tokens) + SLACK_PAGES)

    @property
    def n_bytes(self) -> int:
        """Of all pages, in use or not."""
        return sum(group.n_bytes for group in self._groups)

    def begin(self, layers: Layers, step: Step) -> Pass:
        """See `KvCache.begin`."""
        groups = self._of(layers)
        for group in groups:
            check_step(step, group.rooms)
        if step.kv:
            self._change(groups, step.kv)
        pages: dict[int, LayerKv] = {}
        rows: dict[int, Rows] = {}
        for group in groups:
            group.extend(step.chunks)
            pages |= group.arrays
            rows |= dict.fromkeys(group.arrays, group.rows(step.chunks))
        decodes, longest = _decodes(step.chunks), _longest(step.chunks)
        return Pass(tuple(spans(step.chunks)), decodes, longest, pages, rows, self._device, {})

    def close(self) -> None:
        """Gives the memory back to the device too, with what else of torch's is not in use."""
        self._groups.clear()
        give_back(self._device)

    def _of(self, layers: Layers) -> list[_Group]:
        """The groups of exactly these layers: one that has others too comes apart, those alike become one again."""
        wanted, inside = set(layers), list[_Group]()
        for group in self._groups[:]:
            common = group.arrays.keys() & wanted
            if not common:
                continue
            if common != group.arrays.keys():
                self._groups.append(group := group.without(common))
            twin = next((other for other in inside if other.is_like(group)), None)
            if twin is None:
                inside.append(group)
            else:
                twin.arrays |= group.arrays
                self._groups.remove(group)
        return inside

    def _change(self, groups: Sequence[_Group], operations: Sequence[KvOp]) -> None:
        """Apply checked operations. All memory is taken first, so that a failed allocation changes nothing: a copy may
        go where a sequence was that the same step drops."""
        changes = [_Change(group, operations) for group in groups]
        copiers = [_Copier(group, change.copies) for group, change in zip(groups, changes, strict=True)]
        for copier in copiers:
            copier.copy()
        for group, change in zip(groups, changes, strict=True):
            group.rooms, group.free, group.n_used = change.rooms, change.free, change.n_used


class _Group:
    """Layers that have seen the same steps. Pages are handed out in order; `free` has those that came back."""

    def __init__(self, device: torch.device, arrays: dict[int, LayerKv]) -> None:
        self.arrays, self.device = arrays, device
        self.rooms: dict[int, Room] = {}
        self.free: list[int] = []
        self.n_used = self.n_pages = 0

    @property
    def n_bytes(self) -> int:
        return sum(pages.nbytes for arrays in self.arrays.values() for pages in _tensors(arrays))

    def is_like(self, other: _Group) -> bool:
        """Whether the same pages are where, so that one may stand for both."""
        return (
            (self.n_used, self.n_pages, self.free) == (other.n_used, other.n_pages, other.free)
            and self.rooms.keys() == other.rooms.keys()
            and all(room.is_like(other.rooms[sequence]) for sequence, room in self.rooms.items())
        )

    def without(self, layers: Iterable[int]) -> _Group:
        """Splits these layers off: another group, with the same rooms, that goes its own way from now on."""
        group = _Group(self.device, {layer: self.arrays.pop(layer) for layer in layers})
        group.rooms, group.free = dict(self.rooms), list(self.free)
        group.n_used, group.n_pages = self.n_used, self.n_pages
        return group

    def grow(self, n_pages: int) -> None:
        """At least so many pages; where there is room, a quarter more than there were, so that they are not copied
        again and again.

        Raises DeviceMemoryError; what was written stays where it can be read.
        """
        if (wanted := self.n_pages + self.n_pages // 4) > n_pages:
            with suppress(DeviceMemoryError):  # on a device that is full but for little
                return self._enlarge(wanted)
        return self._enlarge(n_pages)

    def _enlarge(self, n_pages: int) -> None:
        what = f"{n_pages * PAGE} positions of KV in {len(self.arrays)} layers on {self.device}"
        with room_for(what, hint="use a smaller context (-c) or more quantised KV (--kv-type q8_0)"):
            for layer, arrays in self.arrays.items():
                self.arrays[layer] = _grown(arrays, n_pages)
        self.n_pages = n_pages

    def extend(self, chunks: Iterable[Chunk]) -> None:
        """What the chunks will write is there, and what stood after it is forgotten."""
        for chunk in chunks:
            room = self.rooms[chunk.sequence]
            self.rooms[chunk.sequence] = Room(room.pages, chunk.start + chunk.count, room.capacity)

    def rows(self, chunks: Sequence[Chunk]) -> Rows:
        slots = np.empty(sum(chunk.count for chunk in chunks), np.int64)
        lengths = np.array([chunk.start + chunk.count for chunk in chunks], np.int32)
        pages = tuple(
            self.rooms[chunk.sequence].pages[: _n_pages(int(n))] for chunk, n in zip(chunks, lengths, strict=True)
        )
        for (start, stop, chunk), own in zip(spans(chunks), pages, strict=True):
            positions = np.arange(chunk.start, chunk.start + chunk.count)
            slots[start:stop] = own[positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        return Rows(slots, pages, lengths)


class _Change:
    """What operations make of a group's rooms. Nothing of the group changes yet, but it may get more pages."""

    def __init__(self, group: _Group, operations: Iterable[KvOp]) -> None:
        self.rooms, self.free, self.n_used = dict(group.rooms), list(group.free), group.n_used
        self.copies: list[tuple[PageNumbers, PageNumbers]] = []  # from pages, to pages: one after the other
        self._group = group
        for operation in operations:
            self._follow(operation)

    def _follow(self, operation: KvOp) -> None:
        sequence, length, capacity = operation.sequence, operation.length, operation.capacity
        match operation.kind:
            case KvKind.OPEN:
                self.rooms[sequence] = Room(self._resized(_NONE, capacity), 0, capacity)
            case KvKind.FORK:
                pages, n = self._resized(_NONE, capacity), _n_pages(length)
                self.copies.append((self.rooms[operation.source].pages[:n], pages[:n]))
                self.rooms[sequence] = Room(pages, length, capacity)
            case KvKind.MOVE:
                pages = self._resized(self.rooms.pop(operation.source).pages, capacity)
                self.rooms[sequence] = Room(pages, length, capacity)
            case KvKind.DROP if sequence in self.rooms:
                self._resized(self.rooms.pop(sequence).pages, 0)

    def _resized(self, pages: PageNumbers, capacity: int) -> PageNumbers:
        """As many of a room's pages, and new ones, as `capacity` positions take; the others are free."""
        n = _n_pages(capacity)
        self.free.extend(pages[n:].tolist())
        missing = max(0, n - len(pages))
        n_again = min(missing, len(self.free))
        n_used = self.n_used + missing - n_again
        if n_used > self._group.n_pages:
            self._group.grow(n_used)
        again = np.array([self.free.pop() for _ in range(n_again)], np.int32)
        fresh = np.arange(self.n_used, n_used, dtype=np.int32)
        self.n_used = n_used
        return np.concatenate([pages[:n], again, fresh])


_NONE = np.empty(0, np.int32)


class _Copier:
    """Copies pages of a group to others, some at a time, by way of memory that it takes when it is made.

    Raises DeviceMemoryError then, and no more later.
    """

    def __init__(self, group: _Group, copies: Sequence[tuple[PageNumbers, PageNumbers]]) -> None:
        numbers = [
            np.stack([source, target])[:, start : start + COPIED_PAGES]
            for source, target in copies
            for start in range(0, len(source), COPIED_PAGES)
        ]
        most = max((part.shape[1] for part in numbers), default=0)
        self._pages = [pages for arrays in group.arrays.values() for pages in _tensors(arrays)]
        with room_for(f"a copy of KV on {group.device}", hint="use a smaller context (-c)"):
            self._rows = [torch.from_numpy(part).to(group.device).long() for part in numbers]
            alike = {pages.dtype: pages for pages in self._pages}
            self._between = {dtype: _space(pages, most) for dtype, pages in alike.items()}

    def copy(self) -> None:
        for source, target in self._rows:
            for pages in self._pages:
                between = self._between[pages.dtype][: len(source)]
                torch.index_select(pages, 0, source, out=between)
                pages.index_copy_(0, target, between)


def _space(like: torch.Tensor, n_pages: int) -> torch.Tensor:
    return torch.empty((n_pages, *like.shape[1:]), dtype=like.dtype, device=like.device)


def _n_pages(n_positions: int) -> int:
    return -(-n_positions // PAGE)


def _decodes(chunks: Sequence[Chunk]) -> bool:
    return all(chunk.count == 1 for chunk in chunks) and len({chunk.sequence for chunk in chunks}) == len(chunks)


def _longest(chunks: Iterable[Chunk]) -> int:
    """A power of two, from SHORTEST on, that no sequence's length exceeds."""
    longest = max((chunk.start + chunk.count for chunk in chunks), default=1)
    return max(SHORTEST, 1 << (longest - 1).bit_length())


def _no_pages(type: KvType, n_kv_heads: int, head_dim: int, device: torch.device) -> Half:
    def array(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((0, PAGE, n_kv_heads, width), dtype=dtype, device=device)

    scales = array(head_dim // RUN, torch.float16) if type is KvType.Q8_0 else None
    return Half(array(head_dim, _ELEMENTS[type]), scales)


def _grown(arrays: LayerKv, n_pages: int) -> LayerKv:
    return LayerKv(
        *(
            Half(_enlarged(half.values, n_pages), None if half.scales is None else _enlarged(half.scales, n_pages))
            for half in (arrays.k, arrays.v)
        )
    )


def _enlarged(pages: torch.Tensor, n_pages: int) -> torch.Tensor:
    larger = _space(pages, n_pages)
    n_kept = min(n_pages, len(pages))
    larger[:n_kept] = pages[:n_kept]
    return larger


def _tensors(arrays: LayerKv) -> Iterator[torch.Tensor]:
    for half in (arrays.k, arrays.v):
        yield half.values
        if half.scales is not None:
            yield half.scales


# ---------------------------------------------------------------- by torch operations


def write(half: Half, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Put rows f32 [n, n_kv_heads * head_dim] at `slots`."""
    values = rows.view(len(rows), *half.values.shape[2:])
    if half.scales is None:
        half.values.flatten(0, 1).index_copy_(0, slots, values.to(half.values.dtype))
        return
    codes, scales = _quantized(values)
    half.values.flatten(0, 1).index_copy_(0, slots, codes)
    half.scales.flatten(0, 1).index_copy_(0, slots, scales)


def heads_of(half: Half, first: int, stop: int) -> Half:
    """Some heads, a view."""
    return Half(half.values[:, :, first:stop], None if half.scales is None else half.scales[:, :, first:stop])


def read(half: Half, pages: torch.Tensor) -> torch.Tensor:
    """f32 [positions of the pages, n_kv_heads, head_dim]"""
    values = half.values[pages].flatten(0, 1).to(torch.float32)
    if half.scales is None:
        return values
    scales = half.scales[pages].flatten(0, 1).to(torch.float32)
    return (values.view(*scales.shape, RUN) * scales[..., None]).view(values.shape)


def _quantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, n_kv_heads, head_dim] in runs of 32 as int8 and f16 scales: the bits of the numpy backend."""
    runs = values.reshape(*values.shape[:2], -1, RUN)
    largest = runs.abs().amax(-1)
    used = largest.isfinite() & (largest >= SMALLEST)
    inverse = torch.where(used, 127 / largest, 0)
    codes = torch.where(used[..., None], runs * inverse[..., None], 0).round().to(torch.int8)
    scales = torch.where(used, largest / 127, torch.where(largest.isfinite(), 0, torch.nan))
    return codes.flatten(-2), scales.to(torch.float16)
