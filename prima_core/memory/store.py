"""Weights that do not all fit: some stay in memory, the others are read ahead of use, round after round."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prima_core.errors import PlanError
from prima_core.interfaces import Layers, Weight
from prima_core.memory.experts import Experts, ExpertStats
from prima_core.memory.inventory import Inventory, opened
from prima_core.memory.reader import ReadAhead, ReadCounts, Stations, Turn, least_buffer
from prima_core.model.gguf import GGUFFile
from prima_core.model.names import split_layer
from prima_core.model.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.memory.system import DirectFile, System

_USUAL_ALIGNMENT = 4096
"""Of disks whose files are not open yet."""
_MAX_TRIES = 4


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sums since the start, and what is held now. From `read_bytes`/`reading_s` follows the rate of the disk.

    `read_bytes`: read past the page cache, in `reading_s` seconds in which at least one read was under way.
    `stall_s`: who computes waited for weights. `seeks`: other weights were asked for than came next, so that
    `vain_bytes` were read for nothing. `missed_bytes`: streamed weights that were used through the map all the same,
    because there was no room for them in the buffer or they had been demoted a moment before.
    `streamed_bytes`: not kept in memory, whether read in each pass or looked up (a table of embeddings). Hits and
    misses: experts that steps chose, of those that are read on demand, and that were in memory or not.
    """

    read_bytes: int = 0
    reading_s: float = 0.0
    stall_s: float = 0.0
    seeks: int = 0
    vain_bytes: int = 0
    missed_bytes: int = 0
    pinned_bytes: int = 0
    streamed_bytes: int = 0
    buffer_bytes: int = 0
    expert_hits: int = 0
    expert_misses: int = 0


@dataclass(slots=True)
class _Held:
    """A layer in use. `buffered`: names of the tensors that were not given as views into the map."""

    weights: Mapping[str, Weight]
    turn: Turn | None = None
    buffered: frozenset[str] = frozenset()
    count: int = 1


class StreamingStore:
    """`interfaces.Store` of a node that is visited for `visits`, in this order, in every pass, and holds `ends`.

    At least `streamed_bytes` of these weights, or all that can be, are not kept in memory; of them the layers' tensors
    and the output matrix pass through a buffer of `buffer_bytes`. Until `start`, and whenever the buffer does not have
    what is asked for, a view into the map is given: right, but slow. Experts that are not all kept are read when tokens
    choose them, whose part of the buffer is what they use in one layer, or all where nothing else passes through it.
    `host_bytes`: of a device with a memory of its own (None: it is none): so much of what it does not keep stays in the
    host's memory, and only that can be resized.
    With nothing streamed there is neither a thread nor a buffer. Raises PlanError when the buffer is too small,
    ModelError when the file cannot be opened.
    """

    def __init__(
        self,
        file: GGUFFile,
        spec: ModelSpec,
        visits: Sequence[Layers],
        ends: Sequence[str],
        streamed_bytes: int,
        buffer_bytes: int,
        system: System,
        host_bytes: int | None = None,
    ) -> None:
        self._file, self._system = file, system
        self._inventory = Inventory(file, spec, visits, ends, streamed_bytes, system, host_bytes)
        self._shown = {layer: self._inventory.passing_of(layer) for layer in self._inventory.holding.layers}
        self._planned_buffer_bytes = self._buffer_bytes = buffer_bytes  # the latter grows where more is streamed
        self._open_buffer_bytes = 0
        self._counts = ReadCounts()
        self._missed_bytes = 0
        self._held: dict[int, _Held] = {}
        self._files: list[DirectFile] = []
        self._reader: ReadAhead | None = None
        self._is_started = False
        self._fitted = (0, 0)  # the inventory's version, the buffer's bytes
        self._n_used = spec.experts.n_used if spec.experts else 0
        self._experts: Experts | None = None
        self._sharing_out = threading.Lock()  # while experts are told their room
        self._with_experts: dict[int, Mapping[str, Weight]] = {}
        try:
            self._fit_experts()
            self._check_buffer()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ `interfaces.Store`, of the thread that computes

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        """As `interfaces.Store` says. Raises ModelError, which names file and place, when a streamed tensor cannot be
        read; the next call tries again."""
        held = self._held.get(layer)
        if held is None:
            held = self._held[layer] = self._bring(layer)
        else:
            held.count += 1
        return held.weights

    def release(self, layer: int) -> None:
        held = self._held[layer]
        held.count -= 1
        if held.count:
            return
        del self._held[layer]
        if self._reader is not None and held.turn is not None:
            self._reader.free(held.turn)
        for name in self._inventory.streamed_of(layer) - held.buffered:
            self._inventory.drop(name)  # it was used through the map

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self._inventory.mapped.views(layer)

    def give_back(self, weights: Iterable[Weight]) -> None:
        self._inventory.give_back(weights)

    def shared(self) -> Mapping[str, Weight]:
        return self._inventory.mapped.shared()

    def is_streamed(self, name: str) -> bool:
        """Of a layer's tensor: as the layer was acquired last. It changes in `acquire` only."""
        place = split_layer(name)
        return name in self._shown.get(place[0], ()) if place is not None else self._inventory.passes(name)

    def blocks(self, name: str) -> Iterator[Weight]:
        """As `interfaces.Store` says: of the same number of rows each, but for the last. Raises ModelError as
        `acquire` does."""
        holding, whole = self._inventory.holding, self._inventory.mapped.shared()[name]
        if name != holding.output or not self.is_streamed(name):
            yield whole
            return
        self._fit_reader()
        start = 0
        for index in range(len(holding.blocks)):
            stop = min(start + holding.block_rows, whole.shape[0])
            yield from self._block(self._inventory.station_of_block(index), whole.part(start, stop))
            start = stop

    def close(self) -> None:
        """End the readers and forget the views. Idempotent."""
        self._is_started = False
        self._close_reader()
        if self._experts is not None:
            self._experts.close()
        files, self._files = self._files, []
        for file in files:
            file.close()
        self._inventory.close()

    # ------------------------------------------------------------ loading

    def stays(self, name: str) -> bool:
        """Whether a tensor is in memory between passes, on a device or here; of the output see `pinned_ends`."""
        return self._inventory.stays(name)

    def pinned_ends(self) -> list[Weight]:
        """What is kept of the tensors outside the layers; of an output matrix perhaps its first rows only."""
        return self._inventory.kept_ends()

    def start(self) -> None:
        """Begin to read ahead: once what stays is in memory. Pages of streamed tensors that came along with it go."""
        self._is_started = True
        self._inventory.drop_streamed()
        self._fit_reader()

    # ------------------------------------------------------------ of any thread

    @property
    def pinned_bytes(self) -> int:
        """Of the weights of `visits` and `ends`, what is to stay in memory."""
        return self._inventory.pinned_bytes

    @property
    def device_bytes(self) -> int:
        """Of that, what a device has in a memory of its own."""
        return self._inventory.device_bytes

    @property
    def copied_bytes(self) -> int:
        """Of that, what was given back: a device holds it."""
        return self._inventory.copied_bytes

    def lost_bytes(self) -> int | None:
        """Of what is to stay, how much is not in memory any more; None where the system does not tell."""
        return self._inventory.lost_bytes()

    def resize(self, pinned_bytes: int) -> None:
        """Keep at most so much, and as much of it as whole tensors allow, each layer the same share; what is small is
        kept in any case.

        What is given up is dropped at once. What is taken back, and what the system took of the rest, is read here, in
        the caller's thread: choose steps by how long that may take. Raises ModelError when it cannot be read; the
        layers before it are as they were asked for then. A layer's next turn in the buffer is the first that knows.
        Should a layer's share outgrow the planned buffer, that grows, and as much less is kept: what does not fit would
        be read through the page cache page by page, far slower, and push out what stays.
        """
        kept_bytes, buffer_bytes = self._net_of_buffer(pinned_bytes)
        self._buffer_bytes = max(self._buffer_bytes, buffer_bytes)
        try:
            self._inventory.resize(kept_bytes)
        finally:
            self._buffer_bytes = self._buffer_for(self._inventory.stations)
            self._share_out()

    def _net_of_buffer(self, pinned_bytes: int) -> tuple[int, int]:
        """What of it can be kept beside what the buffer will grow by, and the buffer's bytes then."""
        kept_bytes, buffer_bytes = pinned_bytes, self._buffer_bytes
        for _ in range(_MAX_TRIES):  # who keeps less streams more, perhaps through a larger buffer
            buffer_bytes = self._buffer_for(self._inventory.stations_with(kept_bytes))
            net_bytes = pinned_bytes - max(0, buffer_bytes - self._buffer_bytes)
            if kept_bytes <= net_bytes:
                break
            kept_bytes = net_bytes
        return kept_bytes, buffer_bytes

    def stats(self) -> StoreStats:
        counts, inventory = self._counts, self._inventory
        experts = ExpertStats() if self._experts is None else self._experts.stats()
        return StoreStats(
            counts.read_bytes + experts.read_bytes,
            counts.reading_s + experts.reading_s,
            counts.stall_s + experts.stall_s,
            counts.seeks,
            counts.vain_bytes,
            self._missed_bytes,
            inventory.pinned_bytes,
            inventory.streamed_bytes,
            0 if self._reader is None and self._experts is None else self._buffer_bytes,
            experts.hits,
            experts.misses,
        )

    # ------------------------------------------------------------ what is acquired

    def _bring(self, layer: int) -> _Held:
        station = self._inventory.station_of(layer)
        if station is None:
            return _Held(self._inventory.mapped.acquire(layer))
        self._fit_experts()
        self._fit_reader()
        whole = self._with_experts.get(layer) or self._inventory.mapped.acquire(layer)
        stacks = self._inventory.holding.experts.get(layer, {}).keys() if layer in self._with_experts else ()
        turn = None if self._reader is None else self._reader.take(station)
        names = self._inventory.streamed_of(layer)
        self._shown[layer] = self._inventory.passing_of(layer)
        data = self._buffered(turn, names)
        if self._reader is not None:
            sizes = self._inventory.holding.layers[layer]
            self._missed_bytes += sum(sizes.get(name, 0) for name in names - data.keys())
        if not data:
            return _Held(whole, turn, frozenset(stacks))
        weights = {
            short: replace(weight, data=data[weight.name]) if weight.name in data else weight
            for short, weight in whole.items()
        }
        return _Held(weights, turn, frozenset(data).union(stacks))

    def _buffered(self, turn: Turn | None, names: frozenset[str]) -> dict[str, NDArray[np.uint8]]:
        """What a turn has of these: others were taken back into memory since it was read."""
        if self._reader is None or turn is None:
            return {}
        return {
            unit.name: self._reader.view(turn, index) for index, unit in enumerate(turn.units) if unit.name in names
        }

    def _block(self, station: int, block: Weight) -> Iterator[Weight]:
        reader = self._reader  # the store may be closed before who computes has let go of the block
        turn = None if reader is None else reader.take(station)
        if reader is None or turn is None:
            yield block
            return
        try:
            if turn.units:
                yield replace(block, data=reader.view(turn, 0))
            else:
                self._missed_bytes += len(block.data) if self._inventory.stations[station] else 0
                yield block
        finally:
            reader.free(turn)

    # ------------------------------------------------------------ experts

    def _fit_experts(self) -> None:
        """Have them read on demand where that is so by now; not while a layer is in use."""
        if self._experts is not None or self._held or not self._inventory.streamed.on_demand:
            return
        stacks = self._inventory.holding.experts
        self._experts = experts = Experts(self._file, stacks, self._n_used, 0, self._system)
        self._with_experts = {
            layer: {**self._inventory.mapped.views(layer), **experts.weights(layer)} for layer in stacks
        }
        self._share_out()

    def _share_out(self) -> None:
        """Tell experts their room; in turns, or the room of a moment ago might be what stays."""
        with self._sharing_out:
            if self._experts is not None:
                inventory = self._inventory
                spare = self._experts.group_bytes if any(inventory.stations) else self._buffer_bytes
                self._experts.resize(inventory.holding.expert_bytes - inventory.streamed.expert_bytes + spare)

    @property
    def _group_bytes(self) -> int:
        """What experts have of the buffer beside what is read ahead."""
        return 0 if self._experts is None else self._experts.group_bytes

    # ------------------------------------------------------------ the readers

    def _fit_reader(self) -> None:
        """Have one where something is streamed, with a buffer as large as it is to be; not while a layer is in use."""
        wanted = self._inventory.version, self._buffer_bytes
        if wanted == self._fitted or self._held or not self._is_started:
            return
        if not any(self._inventory.stations):
            self._close_reader()
        else:
            self._open_files()
            if self._least_buffer(self._inventory.stations) > self._buffer_bytes:  # experts came, or large blocks
                self._buffer_bytes = self._buffer_for(self._inventory.stations)
            if self._reader is None or self._open_buffer_bytes != self._buffer_bytes - self._group_bytes:
                self._close_reader()
                self._open_reader()
        self._fitted = wanted  # another thread may want something else by now

    def _buffer_for(self, stations: Stations) -> int:
        """How large the buffer is to be for these: as planned where that will do, then as it is; else it grows to twice
        what they need, so that the disk need not wait, but no more than what holds any layer as a whole."""
        if not any(stations):
            return self._planned_buffer_bytes
        least = self._least_buffer(stations)
        enough = [size for size in (self._planned_buffer_bytes, self._buffer_bytes) if size >= least]
        return enough[0] if enough else min(2 * least, self._least_buffer(self._inventory.all_stations()))

    def _open_reader(self) -> None:
        self._open_buffer_bytes = self._buffer_bytes - self._group_bytes
        buffer = self._system.buffer(self._open_buffer_bytes, is_filled=True)
        paths = [part.path for part in self._file.parts]
        self._reader = ReadAhead(self._inventory.stations, self._open_files(), paths, buffer, self._counts)

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _check_buffer(self) -> None:
        if not any(self._inventory.stations):
            return
        self._open_files()
        least = self._least_buffer(self._inventory.stations)
        if least > self._buffer_bytes:
            raise PlanError(
                f"weights are streamed through a buffer of {self._buffer_bytes:,} bytes, but a layer's need {least:,}",
                hint=f"give this node a buffer of at least {least:,} bytes; with twice as much the disk need not wait",
            )

    def _least_buffer(self, stations: Stations) -> int:
        alignment = max((file.alignment for file in self._files), default=_USUAL_ALIGNMENT)
        return least_buffer(stations, alignment) + self._group_bytes

    def _open_files(self) -> list[DirectFile]:
        """Raises ModelError when they are not there any more, or not those that are mapped."""
        if not self._files:
            with ExitStack() as on_error:
                files = opened(self._file, range(len(self._file.parts)), self._system, on_error)
                on_error.pop_all()
            self._files = list(files.values())
        return self._files
