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
from prima_core.memory.inventory import unreadable
from prima_core.memory.readers import Batch, Readers
from prima_core.memory.residents import Flags, Indices, Residents
from prima_core.memory.stacks import Stack
from prima_core.memory.system import DirectFile, System
from prima_core.model.gguf import GGUFFile
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
    """Experts of which at most `budget_bytes` are in memory: one at least, whatever the budget.

    `stacks`: by layer, the full names of the tensors with a matrix of each expert; `n_used` experts see a token. The
    weights may be used until `close`. Raises ModelError when a file cannot be opened.
    """

    def __init__(
        self,
        file: GGUFFile,
        stacks: Mapping[int, Iterable[str]],
        n_used: int,
        budget_bytes: int,
        system: System,
    ) -> None:
        self._rows = {layer: row for row, layer in enumerate(stacks)}
        with ExitStack() as files:
            open_file = _opener(file, system, files)
            infos = [[file.tensors[name] for name in names] for names in stacks.values()]
            self._stacks = [
                [Stack(info, file.parts[info.part].path, open_file(info.part), system) for info in of_layer]
                for of_layer in infos
            ]
            self._files = files.pop_all()
        self._n_used = n_used
        self._sizes = [sum(stack.expert_bytes for stack in stacks) for stacks in self._stacks]
        n_experts = self._stacks[0][0].info.shape[0]
        self._residents = Residents(self._sizes, n_experts, n_used, budget_bytes, self._release)
        self._weights = {layer: self._bound(layer) for layer in self._rows}
        self._readers = Readers()
        self._hits = self._misses = 0
        self._stall_s = 0.0

    def weights(self, layer: int) -> Mapping[str, Weight]:
        """The stacks of a layer by their short names, always the same; they have one `require` for all."""
        return self._weights[layer]

    def resize(self, budget_bytes: int) -> None:
        """Keep no more than this from now on. From any thread."""
        self._residents.resize(budget_bytes)

    @property
    def n_bytes(self) -> int:
        """What the experts in memory take."""
        return self._residents.n_bytes

    @property
    def group_bytes(self) -> int:
        """What those take that a token uses in one layer."""
        return self._n_used * max(self._sizes)

    def stats(self) -> ExpertStats:
        """From any thread."""
        return ExpertStats(self._hits, self._misses, self._readers.read_bytes, self._readers.reading_s, self._stall_s)

    def close(self) -> None:
        """Ends the readers and gives the memory back. Idempotent."""
        self._readers.close()
        self._files.close()
        self._residents.resize(0)

    def _require(self, row: int, chosen: Indices) -> Iterator[Indices]:
        """As `Weight.require`, of all stacks of a layer: first those in memory, while others are read; of these a few
        at a time."""
        wanted = self._residents.count(row, chosen)
        here = self._residents.hold(row, wanted)
        missing = np.setdiff1d(wanted, here, assume_unique=True)
        self._hits += len(here)
        self._misses += len(missing)
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
            coming.append((group, self._readers.submit(reads)))
            missing = missing[len(group) :]
        return missing

    def _wait(self, batch: Batch) -> None:
        began = time.monotonic()
        batch.wait()
        self._stall_s += time.monotonic() - began

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
                raise unreadable(path, error) from error
            files.callback(opened[part].close)
        return opened[part]

    return open_file
