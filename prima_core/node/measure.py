"""What a node finds out about its machine before it joins: quick, and only what plans can use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.model.split import all_parts

if TYPE_CHECKING:
    from prima_core.memory.system import DirectFile, System

log = logging.getLogger(__name__)

MEASURE_S = 0.4
GIVE_UP_AFTER_S = 2.0
"""A disk that hangs is left alone: its file stays open."""
N_READERS = 4  # as many as read weights: see `memory/reader.py`
PIECE_BYTES = 4 * 1024 * 1024


def largest_model(places: Iterable[Path]) -> Path | None:
    """Of the model files that these places are or have in them; a split one counts as a whole."""
    sizes: dict[Path, int] = {}
    for path in (path for place in places for path in (place.glob("*.gguf") if place.is_dir() else (place,))):
        with suppress(OSError):
            first = all_parts(path)[0]
            sizes[first] = sizes.get(first, 0) + path.stat().st_size
    return max(sizes, key=lambda path: sizes[path], default=None)


def disk_rate(paths: Iterable[Path], memory_bytes: int, system: System) -> float:
    """Bytes that the disk gives in a second, by reading the largest of these files past the page cache for a moment.

    0, which means that it is not known, where no file is larger than `memory_bytes`: none will be streamed by a node
    alone; and where it cannot be read so.
    """
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    largest = max(sizes, key=lambda path: sizes[path], default=None)
    if largest is None or sizes[largest] <= max(memory_bytes, N_READERS * PIECE_BYTES):
        return 0.0
    try:
        file = system.open_direct(largest)
    except OSError as error:
        log.info("the rate of the disk of %s is not known: %s", largest, error)
        return 0.0
    return _rate(file, sizes[largest], system)


def _rate(file: DirectFile, n_bytes: int, system: System) -> float:
    """Each thread has its own part of the file. Closes it."""
    readers = [_Reader(file, index * (n_bytes // N_READERS) // PIECE_BYTES * PIECE_BYTES) for index in range(N_READERS)]
    until_s = time.perf_counter() + MEASURE_S
    end_bytes = n_bytes // N_READERS

    def read(reader: _Reader) -> None:
        try:
            reader.read_until(until_s, reader.begin + end_bytes, system)
        except OSError as error:
            log.info("the disk could not be measured: %s", error)

    threads = [threading.Thread(target=read, args=(reader,), daemon=True) for reader in readers]
    for thread in threads:
        thread.start()
    give_up_s = time.perf_counter() + GIVE_UP_AFTER_S
    for thread in threads:
        thread.join(max(0.0, give_up_s - time.perf_counter()))
    if not any(thread.is_alive() for thread in threads):
        file.close()
    return sum(reader.bytes_s for reader in readers)


@dataclass(slots=True)
class _Reader:
    """What one thread reads, from its first piece's end on: that one a disk with a limit may give at once."""

    file: DirectFile
    begin: int
    began_s: float = 0.0
    ended_s: float = 0.0
    n_bytes: int = 0

    def read_until(self, until_s: float, end: int, system: System) -> None:
        buffer = system.buffer(PIECE_BYTES, is_filled=True)  # as who reads weights has it
        self.file.read(buffer, self.begin)
        at, self.began_s = self.begin + PIECE_BYTES, time.perf_counter()
        while at + PIECE_BYTES <= end and (not self.n_bytes or time.perf_counter() < until_s):
            self.n_bytes += self.file.read(buffer, at)
            self.ended_s = time.perf_counter()
            at += PIECE_BYTES

    @property
    def bytes_s(self) -> float:
        return self.n_bytes / (self.ended_s - self.began_s) if self.ended_s > self.began_s else 0.0
