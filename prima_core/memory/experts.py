"""Mixtures of experts larger than memory: the experts that tokens choose are read, those chosen often stay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.memory.readers import Batch, Readers
from prima_core.memory.residents import Flags, Indices, Residents
from prima_core.memory.stacks import Stack
from prima_core.memory.system import DirectFile, System
from prima_core.model.gguf import GGUFFile
from prima_core.model.header import TensorInfo
from prima_core.model.names import split_layer
from prima_core.model.weights import layer_names

N_READERS = 4


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What steps asked for; to `fill` the memory does not count. An expert that several tokens of a step choose in a
    layer is one hit or one miss. `stall_s`: how long was waited for the disk."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of hits; 1 where nothing was missed."""
        return self.hits / (self.hits + self.misses) if self.misses else 1.0


def expert_stacks(file: GGUFFile, layer: int) -> list[TensorInfo]:
    """The tensors of a layer that hold a matrix of each expert."""
    tensors = (file.tensors[name] for name in layer_names(file, layer))
    return [info for info in tensors if len(info.shape) == 3]


class Experts:
    """The experts of some layers, of which at most `budget_bytes` are in memory: one at least, whatever the budget.

    `n_used` experts see a token. The weights may be used until `close`.
    """

    def __init__(self, file: GGUFFile, layers: Iterable[int], n_used: int, budget_bytes: int, system: System) -> None:
        """Raises ModelError when a file cannot be opened. Each of `layers` has experts."""
        self._rows = {layer: row for row, layer in enumerate(dict.fromkeys(layers))}
        with ExitStack() as files:
            open_file = _opener(file, system, files)
            self._stacks = [
                [Stack(info, file.parts[info.part].path, open_file(info.part), system) for info in stacks]
                for stacks in (expert_stacks(file, layer) for layer in self._rows)
            ]
            self._files = files.pop_all()
        self._n_used, self._n_experts = n_used, self._stacks[0][0].info.shape[0]
        self._sizes = [sum(stack.expert_bytes for stack in stacks) for stacks in self._stacks]
        self._budget_bytes = budget_bytes
        self._residents = Residents(self._sizes, self._n_experts, n_used, budget_bytes, self._release)
        self._weights = {layer: self._bound(layer) for layer in self._rows}
        self._readers = Readers(N_READERS)
        self._stats = ExpertStats()

    def weights(self, layer: int) -> Mapping[str, Weight]:
        """The stacks of a layer by their short names, always the same; they have one `require` for all."""
        return self._weights[layer]

    def fill(self, progress: Callable[[int], None] = lambda n_bytes: None) -> None:
        """Read as many of each layer's experts as the budget has room for: which ones are in use is not known yet.

        `progress` is told the bytes as they come. Raises ModelError.
        """
        n = min(self._n_experts, self._budget_bytes // sum(self._sizes))
        for row, size in enumerate(self._sizes):
            for group in self._brought(row, np.arange(n)):
                progress(len(group) * size)
        self._stats = ExpertStats()

    def resize(self, budget_bytes: int) -> None:
        """Keep no more than this from now on. From any thread."""
        self._budget_bytes = budget_bytes
        self._residents.resize(budget_bytes)

    @property
    def n_bytes(self) -> int:
        """What the experts in memory take."""
        return self._residents.n_bytes

    def stats(self) -> ExpertStats:
        return self._stats

    def close(self) -> None:
        """Ends the readers and gives the memory back. Idempotent."""
        self._readers.close()
        self._files.close()
        self._residents.resize(0)

    def _require(self, row: int, chosen: Indices) -> Iterator[Indices]:
        """As `Weight.require`, of all stacks of a layer."""
        yield from self._brought(row, self._residents.count(row, chosen))

    def _brought(self, row: int, wanted: Indices) -> Iterator[Indices]:
        """Groups of the wanted: first those in memory, while others are read; of these a few at a time."""
        here = self._residents.hold(row, wanted)
        missing = np.setdiff1d(wanted, here, assume_unique=True)
        self._count(hits=len(here), misses=len(missing))
        coming: deque[tuple[Indices, Batch]] = deque()
        try:
            missing = self._read_ahead(row, missing, coming)
            if len(here):
                yield here
                self._residents.leave(row, here)
            while coming or len(missing):
                missing = self._read_ahead(row, missing, coming)
                group, batch = coming[0]
                self._wait(batch)
                yield group
                self._residents.leave(row, group)
                coming.popleft()
        finally:
            self._end(row, wanted, [batch for _, batch in coming])

    def _read_ahead(self, row: int, missing: Indices, coming: deque[tuple[Indices, Batch]]) -> Indices:
        """Begin to read what there is room for; gives those that are left."""
        while len(group := self._residents.admit(row, missing[: self._n_used])):
            reads = [read for expert in group for stack in self._stacks[row] for read in stack.reads(int(expert))]
            self._count(read_bytes=sum(len(read.into) for read in reads))
            coming.append((group, self._readers.submit(reads)))
            missing = missing[len(group) :]
        return missing

    def _wait(self, batch: Batch) -> None:
        began = time.monotonic()
        batch.wait()
        self._count(stall_s=time.monotonic() - began)

    def _end(self, row: int, wanted: Indices, coming: Iterable[Batch]) -> None:
        """Nothing is used or read any more. Of a failed read's layer nothing is trusted: neighbours share blocks."""
        failed = False
        for batch in coming:
            try:
                batch.wait()
            except ModelError:
                failed = True
        self._residents.leave(row, wanted)
        if failed:
            self._residents.forget(row)

    def _count(self, hits: int = 0, misses: int = 0, read_bytes: int = 0, stall_s: float = 0.0) -> None:
        old = self._stats
        self._stats = ExpertStats(
            old.hits + hits, old.misses + misses, old.read_bytes + read_bytes, old.stall_s + stall_s
        )

    def _release(self, row: int, expert: int, here: Flags) -> None:
        for stack in self._stacks[row]:
            stack.release(expert, here)

    def _bound(self, layer: int) -> dict[str, Weight]:
        row = self._rows[layer]
        require = partial(self._require, row)
        weights = (stack.weight(require) for stack in self._stacks[row])
        return {place[1]: weight for weight in weights if (place := split_layer(weight.name))}


def _opener(file: GGUFFile, system: System, files: ExitStack) -> Callable[[int], DirectFile]:
    """A function that opens a part of the model, each once; `files` closes them."""
    opened: dict[int, DirectFile] = {}

    def open_file(part: int) -> DirectFile:
        if part not in opened:
            path = file.parts[part].path
            try:
                opened[part] = system.open_direct(path)
            except OSError as error:
                raise ModelError(f"{path} cannot be opened: {error.strerror or error}", field="file") from error
            files.callback(opened[part].close)
        return opened[part]

    return open_file
