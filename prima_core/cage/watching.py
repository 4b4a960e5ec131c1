"""How much memory the nodes take while they run, looked at again and again."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prima_core.cage.cage import Cell

EVERY_S = 0.1
_PROC = Path("/proc")


@dataclass(slots=True)
class Extremes:
    """Of one node: most memory that its processes had mapped and resident, least that was available in its cage."""

    rss_bytes: int
    first_available_bytes: int
    least_available_bytes: int

    def look(self, cell: Cell) -> None:
        self.rss_bytes = max(self.rss_bytes, sum(map(rss_bytes, cell.group.processes())))
        self.least_available_bytes = min(self.least_available_bytes, cell.group.available_bytes())

    @property
    def drop_bytes(self) -> int:
        return self.first_available_bytes - self.least_available_bytes


class MemoryWatch:
    """From the begin of the block to its end; a thread looks."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = cells
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="prima-cage-memory")
        available = {cell.node.name: cell.group.available_bytes() for cell in cells}
        self.extremes: Mapping[str, Extremes] = {name: Extremes(0, n, n) for name, n in available.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(EVERY_S):
            for cell in self._cells:
                self.extremes[cell.node.name].look(cell)


def rss_bytes(process: int) -> int:
    """Resident memory of a process, 0 when it has ended."""
    with suppress(OSError, ValueError):
        for line in (_PROC / str(process) / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
