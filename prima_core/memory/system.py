"""What the operating systems do differently with memory and files: available memory, reads past the page cache, pages.

Sizes are in bytes. `host()` gives the one that this process runs on; nothing else of prima asks which it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_MB = 10**6


class MemoryKind(StrEnum):
    """Whose memory it is. A GROUP of processes with a limit is there to be filled; a PHONE ends programs before its
    memory is full."""

    MACHINE = "machine"
    GROUP = "group"
    PHONE = "phone"


@dataclass(frozen=True, slots=True)
class Memory:
    """`available_bytes`: what this process and others may still take without swapping; clean pages of files, a mapped
    model's too, count as available. Of the machine and the groups that limit this process it is the one that has least
    beyond its reserve, whose `kind` is told.

    `mapped_bytes`: pages of files that are mapped into some process there: available as they are called, somebody uses
    them, another node perhaps. 0 where the system does not tell.
    """

    total_bytes: int
    available_bytes: int
    mapped_bytes: int = 0
    kind: MemoryKind = MemoryKind.MACHINE

    @property
    def reserve_bytes(self) -> int:
        """What a node leaves of it to others: their cached files too, so that a GB of these and some room to grow are
        in it where there is enough."""
        total = self.total_bytes
        match self.kind:
            case MemoryKind.GROUP:
                return min(max(16 * _MB, total // 50), 256 * _MB, total // 4)
            case MemoryKind.PHONE:
                return min(max(1500 * _MB, total // 5), 4000 * _MB, total // 3)
            case MemoryKind.MACHINE:
                return min(max(1500 * _MB, total // 10), 4000 * _MB, total // 4)

    @property
    def free_bytes(self) -> int:
        """What is available beyond the reserve; below zero where others lack some of it."""
        return self.available_bytes - self.reserve_bytes


class DirectFile(Protocol):
    """A file that is read past the page cache where the system can do that; otherwise what was read is dropped from the
    cache. From any thread, without the GIL while the disk works."""

    @property
    def alignment(self) -> int:
        """Offsets, lengths and addresses of reads are multiples of this."""
        ...

    def read(self, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset`; how many bytes were there, less than asked for only at the end of the file.

        Raises OSError as the system says it.
        """
        ...

    def close(self) -> None: ...


class System(Protocol):
    def memory(self) -> Memory: ...

    def pressure(self) -> float | None:
        """Share of the last ten seconds in which some process waited for memory, where the system tells it."""
        ...

    def open_direct(self, path: Path) -> DirectFile:
        """Raises OSError."""
        ...

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        """Writable memory at an address that direct reads take; its pages come when they are first written, after
        `claim` for their part unless it `is_filled`. It goes with its last view.

        `is_filled`: all of it will be written and go as one, so large pages are welcome: reads by several threads into
        them were measured at 1.9 GB/s where pages that lie anywhere took 1.2 to 1.5 (virtual disk). The first touch
        may wait for the system to move others together, 0.5 s for 256 MB; and a part that is given back takes its
        neighbours' page along, or stays.
        """
        ...

    def claim(self, part: memoryview) -> None:
        """Before a part of such a buffer is written, at first or after `release`. Raises MemoryError."""
        ...

    def release(self, part: memoryview) -> None:
        """Give the whole pages of a part of such a buffer back; its contents are lost."""
        ...

    def populate(self, data: NDArray[np.uint8]) -> None:
        """Bring the pages of a view into a map into memory, without the GIL. Raises OSError: behind the end of the
        file, or a disk that fails."""
        ...

    def forget(self, data: NDArray[np.uint8]) -> None:
        """Take the whole pages of a view into a map out of this process; they stay readable, and cached while nobody
        needs the room. Where the system has no such call nothing happens."""
        ...

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None:
        """Take the whole pages of a view of a map of the file out of this process and out of the page cache."""
        ...

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        """How much of a view of a map of the file is in memory; None where the system does not tell the truth."""
        ...


def host() -> System:
    """This machine's."""
    if sys.platform == "win32":
        from prima_core.memory.windows import Windows

        return Windows()
    if sys.platform == "darwin":
        from prima_core.memory.darwin import Darwin

        return Darwin()
    from prima_core.memory.linux import Linux

    return Linux()
