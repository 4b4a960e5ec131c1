"""A `System` of plain files and bytes: what is given back is poisoned, reads are written down and may fail."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prima_core.memory.system import Memory

POISON = 0xFF
"""As the scale of a block it is NaN: who computes with bytes that are not there any more is found out."""
ALIGNMENT = 512


@dataclass
class FakeSystem:
    """`fails_after` n: the reads after the next n fail with EIO. `cut_bytes`: so many are missing at the file's end."""

    read_bytes: int = 0
    n_reads: int = 0
    fails_after: int | None = None
    cut_bytes: int = 0
    released_bytes: int = 0
    open_files: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def memory(self) -> Memory:
        return Memory(1 << 34, 1 << 33)

    def pressure(self) -> float | None:
        return None

    def open_direct(self, path: Path) -> FakeFile:
        self.open_files += 1
        return FakeFile(self, path.read_bytes())

    def buffer(self, n_bytes: int) -> memoryview:
        return np.full(n_bytes, POISON, np.uint8).data

    def release(self, part: memoryview) -> None:
        np.frombuffer(part, np.uint8)[:] = POISON
        self.released_bytes += len(part)

    def populate(self, data: NDArray[np.uint8]) -> None: ...

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None: ...

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        return None


@dataclass
class FakeFile:
    system: FakeSystem
    data: bytes
    alignment: int = ALIGNMENT

    def read(self, into: memoryview, offset: int) -> int:
        assert offset % ALIGNMENT == len(into) % ALIGNMENT == 0
        with self.system.lock:
            self.system.n_reads += 1
            self.system.read_bytes += len(into)
            if self.system.fails_after is not None:
                self.system.fails_after -= 1
                if self.system.fails_after < 0:
                    raise OSError(errno.EIO, "Input/output error")
        found = self.data[: len(self.data) - self.system.cut_bytes][offset : offset + len(into)]
        into[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self.system.open_files -= 1
