"""The experts' matrices of a layer in memory where only some of them have pages, and reading one into its place."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.interfaces import Require, Weight
from prima_core.memory.system import DirectFile, System
from prima_core.model.header import TensorInfo

_PIECE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `into` from `offset` of a file; `n_needed` of these bytes must be there. `what` is said where it fails."""

    file: DirectFile
    path: Path
    into: memoryview
    offset: int
    n_needed: int
    what: str

    def run(self) -> None:
        """Raises ModelError."""
        try:
            n_read = self.file.read(self.into, self.offset)
        except OSError as error:
            raise ModelError(
                f"{self.path} cannot be read: {error.strerror or error}",
                field=self.what,
                hint="look at the disk (on Linux: dmesg); if it is well, fetch the file again",
            ) from error
        if n_read < self.n_needed:
            missing = self.n_needed - n_read
            raise ModelError(
                f"{self.path} ends {missing} bytes before it does", field=self.what, hint="fetch the file again"
            )


class Stack:
    """`data`: as a whole stack of matrices in the map, but with pages of its own for the experts that were read.

    It lies as in the file relative to pages and to what the disk reads at once, so that a read puts every byte in its
    place; at the ends of an expert it brings bytes of the neighbours, the same as are there if these are there.
    """

    def __init__(self, info: TensorInfo, path: Path, file: DirectFile, system: System) -> None:
        self.info, self._path, self._file, self._system = info, path, file, system
        self._page = max(file.alignment, mmap.PAGESIZE)
        self._origin = info.offset // self._page * self._page  # the place in the file of the memory's first byte
        self._memory = system.buffer(_up(info.offset - self._origin + info.n_bytes, self._page))
        data = np.frombuffer(self._memory, np.uint8)[info.offset - self._origin :][: info.n_bytes]
        data.flags.writeable = False
        self.data: NDArray[np.uint8] = data

    def weight(self, require: Require) -> Weight:
        assert self.info.type is not None  # views of this file were made
        return Weight(self.info.name, self.info.type, self.info.shape, self.data, require)

    @property
    def expert_bytes(self) -> int:
        """The most memory that one expert takes."""
        return _up(self._size + self._page, self._page)

    @property
    def _size(self) -> int:
        return self.info.n_bytes // self.info.shape[0]

    def reads(self, expert: int) -> Iterator[Read]:
        """What brings an expert into its place."""
        end = self._begin(expert + 1)
        start, stop = _down(self._begin(expert), self._file.alignment), _up(end, self._file.alignment)
        for offset in range(start, stop, _PIECE_BYTES):
            length = min(_PIECE_BYTES, stop - offset)
            into = self._memory[offset - self._origin :][:length]
            what = f"{self.info.name}, expert {expert}"
            yield Read(self._file, self._path, into, offset, min(length, end - offset), what)

    def release(self, expert: int, here: NDArray[np.bool_]) -> None:
        """Give the pages of an expert back but those that it shares with others that are `here`."""
        start, stop = _down(self._begin(expert), self._page), _up(self._begin(expert + 1), self._page)
        below, above = np.flatnonzero(here[:expert]), np.flatnonzero(here[expert + 1 :])
        if len(below):
            start = max(start, _up(self._begin(int(below[-1]) + 1), self._page))
        if len(above):
            stop = min(stop, _down(self._begin(expert + 1 + int(above[0])), self._page))
        if start < stop:
            self._system.release(self._memory[start - self._origin : stop - self._origin])

    def _begin(self, expert: int) -> int:
        return self.info.offset + expert * self._size


def _down(n: int, unit: int) -> int:
    return n // unit * unit


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
