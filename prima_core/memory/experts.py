"""Mixtures of experts larger than memory: the experts that tokens choose are read, those chosen often stay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from prima_core.errors import DeviceMemoryError, ModelError
from prima_core.interfaces import ExpertGroup, Weight
from prima_core.memory.inventory import opened
from prima_core.memory.readers import Batch, Readers
from prima_core.memory.residents import Indices, Residents
from prima_core.memory.slots import Bytes, Slots, Source
from prima_core.memory.system import DirectFile, System
from prima_core.model.gguf import GGUFFile
from prima_core.model.header import TensorInfo
from prima_core.model.names import split_layer


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Sums since the start. An expert that several tokens of a step choose in a layer is one hit or one miss.

    `reading_s`: at least one read was under way; `stall_s`: who computes waited.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    reading_s: float = 0.0
    stall_s: float = 0.0


class Experts:
    """Experts of which at most `budget_bytes` are in memory: one of each size at least, whatever the budget.

    `stacks`: by layer, the full names of the tensors with a matrix of each expert; `n_used` experts see a token. The
    weights may be used until `close`. Raises ModelError when a file cannot be opened or was changed.
    """

    def __init__(
        self,
        file: GGUFFile,
        stacks: Mapping[int, Iterable[str]],
        n_used: int,
        budget_bytes: int,
        system: System,
    ) -> None:
        self._n_used = n_used
        infos = {layer: [file.tensors[name] for name in names] for layer, names in stacks.items()}
        by_size: dict[tuple[int, ...], list[int]] = {}
        for layer, of_layer in infos.items():
            by_size.setdefault(tuple(info.n_bytes // info.shape[0] for info in of_layer), []).append(layer)
        n_experts = next(iter(infos.values()))[0].shape[0]
        self._kinds = [_Kind(sizes, len(layers), n_experts, n_used, system) for sizes, layers in by_size.items()]
        with ExitStack() as on_error:
            files = opened(file, {info.part for of_layer in infos.values() for info in of_layer}, system, on_error)
            self._readers = Readers(max(file.alignment for file in files.values()), system)
            self._on_close = on_error.pop_all()
        self._on_close.callback(self._readers.close)
        self._layers: dict[int, LayerExperts] = {}
        for kind, layers in zip(self._kinds, by_size.values(), strict=True):
            for row, layer in enumerate(layers):
                sources = [_source(file, info, files[info.part]) for info in infos[layer]]
                self._layers[layer] = LayerExperts(infos[layer], sources, kind, row, n_used, self._readers)
        self.resize(budget_bytes)

    def weights(self, layer: int) -> Mapping[str, Weight]:
        """The stacks of a layer by their short names, always the same; they have one `require` for all."""
        return self._layers[layer].weights

    def resize(self, budget_bytes: int) -> None:
        """Keep no more than this from now on. From any thread."""
        total = sum(kind.total_bytes for kind in self._kinds)
        for kind in self._kinds:
            kind.residents.resize(max(1, budget_bytes * kind.total_bytes // total // kind.slot_bytes))

    @property
    def n_bytes(self) -> int:
        """What the experts in memory take."""
        return sum(kind.residents.n_with_memory * kind.slot_bytes for kind in self._kinds)

    @property
    def group_bytes(self) -> int:
        """What those take that a token uses in one layer."""
        return self._n_used * max(kind.slot_bytes for kind in self._kinds)

    def stats(self) -> ExpertStats:
        """From any thread."""
        layers, readers = self._layers.values(), self._readers
        return ExpertStats(
            sum(layer.hits for layer in layers),
            sum(layer.misses for layer in layers),
            readers.read_bytes,
            readers.reading_s,
            sum(layer.stall_s for layer in layers),
        )

    def close(self) -> None:
        """Ends the readers. The memory goes with the last view of it. Idempotent."""
        self._on_close.close()


class _Kind:
    """Experts of one size, of some layers: they share slots, as many as this machine has memory for at most."""

    def __init__(self, sizes: Sequence[int], n_layers: int, n_experts: int, n_used: int, system: System) -> None:
        self.slot_bytes = sum(sizes)
        self.total_bytes = self.slot_bytes * n_layers * n_experts
        self.n_slots = min(n_layers * n_experts, max(1, system.memory().total_bytes // self.slot_bytes))
        self.slots = Slots(sizes, self.n_slots, system)
        self.residents = Residents(n_layers, n_experts, n_used, self.n_slots, self.slots.release)


class LayerExperts:
    """The experts of a layer, the `row`-th of its kind."""

    def __init__(
        self,
        infos: Sequence[TensorInfo],
        sources: Sequence[Source],
        kind: _Kind,
        row: int,
        n_used: int,
        readers: Readers,
    ) -> None:
        self._sources, self._slots, self._residents = sources, kind.slots, kind.residents
        self._row, self._n_used, self._readers = row, n_used, readers
        self.hits = self.misses = 0
        self.stall_s = 0.0
        self.weights = dict(self._weight(*pair, kind.n_slots) for pair in zip(infos, kind.slots.data, strict=True))

    def require(self, chosen: Indices) -> Iterator[ExpertGroup]:
        """As `Weight.require`: first those in memory, while others are read; of these a few at a time."""
        residents, row = self._residents, self._row
        wanted = residents.count(row, chosen)
        here = residents.hold(row, wanted)
        missing = np.setdiff1d(wanted, here, assume_unique=True)
        self.hits += len(here)
        self.misses += len(missing)
        coming: deque[tuple[Indices, Batch]] = deque()
        try:
            missing = self._read_ahead(missing, coming, must=not len(here))
            if len(here):
                yield here, residents.slots(row, here)
                residents.leave(row, here)
            while coming or len(missing):
                missing = self._read_ahead(missing, coming)
                if not coming:
                    raise self._hangs()
                group, batch = coming[0]
                self._wait(batch)
                yield group, residents.slots(row, group)
                residents.leave(row, group)
                coming.popleft()
        finally:
            self._end(here, coming)

    def _read_ahead(self, missing: Indices, coming: deque[tuple[Indices, Batch]], must: bool = True) -> Indices:
        """Begin to read what there is room for; gives those that are left. Raises DeviceMemoryError where something
        must come, and there is no memory for it."""
        while len(group := self._residents.admit(self._row, missing[: self._n_used])):
            group = self._claimed(group, must and not coming)
            if not len(group):
                break
            slots = self._residents.slots(self._row, group).tolist()
            reads = [
                read
                for expert, slot in zip(group.tolist(), slots, strict=True)
                for stack, source in enumerate(self._sources)
                for read in source.reads(expert, self._slots.place(stack, slot))
            ]
            coming.append((group, self._readers.submit(reads)))
            missing = missing[len(group) :]
        return missing

    def _claimed(self, group: Indices, must: bool) -> Indices:
        """The first of them, as many as there is memory for, where need be that of others."""
        for i, expert in enumerate(group.tolist()):
            try:
                self._claim_slot(expert)
            except MemoryError as error:
                self._residents.give_back(self._row, group[i:])
                if must and not i:
                    hint = "end other programs, or start this node with less --memory"
                    raise DeviceMemoryError(f"there is no memory for an expert: {error}", hint=hint) from error
                return group[:i]
        return group

    def _claim_slot(self, expert: int) -> None:
        try:
            self._slots.claim(self._slot(expert))
        except MemoryError:
            if not self._residents.swap(self._row, expert):
                raise
            self._slots.claim(self._slot(expert))

    def _slot(self, expert: int) -> int:
        return int(self._residents.slots(self._row, np.array([expert]))[0])

    def _wait(self, batch: Batch) -> None:
        began = time.monotonic()
        try:
            batch.wait()
        finally:
            self.stall_s += time.monotonic() - began

    def _hangs(self) -> ModelError:
        return ModelError(
            f"{self._sources[0].path} cannot be read: the disk has not answered for a while",
            field="file",
            hint="check the disk: experts are read again once it answers; if it never does, start again",
        )

    def _end(self, here: Indices, coming: Iterable[tuple[Indices, Batch]]) -> None:
        """Nothing is in use any more; what is being read comes, or does not."""
        self._residents.leave(self._row, here)
        for group, batch in coming:
            try:
                batch.wait()
                self._residents.leave(self._row, group)
            except ModelError:
                if batch.is_done.is_set():
                    self._residents.drop(self._row, group)
                else:
                    slots = self._residents.lose(self._row, group)
                    self._readers.when_done(batch, partial(self._residents.regain, slots))

    def _weight(self, info: TensorInfo, data: Bytes, n_places: int) -> tuple[str, Weight]:
        place = split_layer(info.name)
        assert place is not None  # it was found in a layer
        assert info.type is not None  # the whole file was viewed
        return place[1], Weight(info.name, info.type, info.shape, data, self.require, n_places)


def _source(file: GGUFFile, info: TensorInfo, direct: DirectFile) -> Source:
    return Source(info.name, direct, file.parts[info.part].path, info.offset, info.n_bytes // info.shape[0])
