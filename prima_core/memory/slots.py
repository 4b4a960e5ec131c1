"""Memory for experts of one size: a slot holds the matrices of one expert, whichever layer's it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.memory.reader import PIECE_BYTES
from prima_core.memory.system import DirectFile, System

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Source:
    """A stack in a file: an expert's matrix is `n_bytes` at `offset` + expert * `n_bytes`."""

    name: str
    file: DirectFile
    path: Path
    offset: int
    n_bytes: int

    def reads(self, expert: int, into: Bytes) -> Iterator[Read]:
        """What brings an expert's matrix to a place of its size."""
        begin = self.offset + expert * self.n_bytes
        for start in range(0, self.n_bytes, PIECE_BYTES):
            piece = into[start : start + PIECE_BYTES]
            yield Read(self.file, self.path, begin + start, piece, f"{self.name}, expert {expert}")


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `into` from `offset` of a file. `what` it is, for errors."""

    file: DirectFile
    path: Path
    offset: int
    into: Bytes
    what: str

    def run(self, scratch: memoryview) -> int:
        """How many bytes were read: what the disk can read at once does not begin where a matrix does, so they pass
        through `scratch`. (To copy costs a quarter of what fresh pages cost.) Raises ModelError."""
        skipped = self.offset % self.file.alignment
        needed = skipped + len(self.into)
        n_bytes = -(-needed // self.file.alignment) * self.file.alignment
        try:
            n_read = self.file.read(scratch[:n_bytes], self.offset - skipped)
        except OSError as error:
            raise self.fault(error.strerror or str(error)) from error
        if n_read < needed:
            raise self.fault("the file ends before its weights: was it truncated?")
        self.into[:] = np.frombuffer(scratch, np.uint8)[skipped:needed]
        return n_bytes

    def fault(self, why: str) -> ModelError:
        return ModelError(
            f"{self.path} cannot be read at byte {self.offset} ({self.what}): {why}",
            field="file",
            hint="check the disk, or put the whole file back, and start again",
        )


class Slots:
    """`n` slots for matrices of `sizes` bytes: those of the i-th size lie side by side in `data[i]`, to be read only.
    `claim` a slot before it is written."""

    def __init__(self, sizes: Sequence[int], n: int, system: System) -> None:
        self.sizes, self._system = tuple(sizes), system
        self._memory = [system.buffer(n * size) for size in sizes]
        self._writable = [np.frombuffer(memory, np.uint8).reshape(n, -1) for memory in self._memory]
        self.data = [np.frombuffer(memory.toreadonly(), np.uint8) for memory in self._memory]

    def claim(self, slot: int) -> None:
        """Have memory for it. Raises MemoryError."""
        for part in self._parts(slot):
            self._system.claim(part)

    def place(self, stack: int, slot: int) -> Bytes:
        """Where the matrix of the expert in a slot goes."""
        place: Bytes = self._writable[stack][slot]
        return place

    def release(self, slot: int) -> None:
        """Give the memory of a slot back, but for pages that it shares with its neighbours."""
        for part in self._parts(slot):
            self._system.release(part)

    def _parts(self, slot: int) -> Iterator[memoryview]:
        return (memory[slot * size :][:size] for memory, size in zip(self._memory, self.sizes, strict=True))
