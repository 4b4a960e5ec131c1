"""What a node finds out about its machine before it joins: quick, and only what plans can use."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prima_core.model.split import all_parts
from prima_core.plan.problem import RANDOM_BYTES

if TYPE_CHECKING:
    from prima_core.memory.system import DirectFile, System

log = logging.getLogger(__name__)

SETTLE_S = 0.3
"""Limits (of a control group, of a rented disk) let a burst pass: 30 % more was seen than what lasts."""
MEASURE_S = 0.9
"""Over 0.4 s a disk that was limited to 428 MB/s gave 390 to 460."""
GIVE_UP_AFTER_S = 3.0
"""A disk that hangs is left alone: its file stays open."""
N_READERS = 4  # as many as read weights: see `memory/reader.py`
PIECE_BYTES = 4 * 1024 * 1024
MEMORY_BYTES = 256 * 1024 * 1024
"""More than caches hold."""
MEMORY_RUNS = 3


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
    return _rate(largest, sizes[largest], PIECE_BYTES, _in_order, system)


def random_disk_rate(paths: Iterable[Path], system: System) -> float:
    """As `disk_rate`, by pieces of 1 MiB from anywhere in the file, as experts are read; 0: not known."""
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    largest = max(sizes, key=lambda path: sizes[path], default=None)
    if largest is None or sizes[largest] <= N_READERS * PIECE_BYTES:
        return 0.0
    return _rate(largest, sizes[largest], RANDOM_BYTES, _anywhere, system)


def _in_order(begin: int, end: int) -> Iterator[int]:
    return cycle(range(begin, end - PIECE_BYTES + 1, PIECE_BYTES))


def _anywhere(begin: int, end: int) -> Iterator[int]:
    chance, n_pieces = random.Random(begin), (end - begin) // RANDOM_BYTES
    return (begin + chance.randrange(n_pieces) * RANDOM_BYTES for _ in count())


def _rate(
    path: Path, n_bytes: int, piece_bytes: int, places: Callable[[int, int], Iterator[int]], system: System
) -> float:
    """Each thread has its own part of the file; `places` gives where it reads in that, a piece after the other."""
    try:
        file = system.open_direct(path)
    except OSError as error:
        log.info("the rate of the disk of %s is not known: %s", path, error)
        return 0.0
    share = n_bytes // N_READERS
    begins = [index * share // PIECE_BYTES * PIECE_BYTES for index in range(N_READERS)]
    readers = [_Reader(file, piece_bytes, places(begin, begin + share)) for begin in begins]
    start_s = time.perf_counter()

    def read(reader: _Reader) -> None:
        try:
            reader.read_from(start_s + SETTLE_S, start_s + SETTLE_S + MEASURE_S, system)
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
    """What one thread reads, from the end of the first piece that is there at a certain time on."""

    file: DirectFile
    piece_bytes: int
    places: Iterator[int]
    began_s: float = 0.0
    ended_s: float = 0.0
    n_bytes: int = 0

    def read_from(self, since_s: float, until_s: float, system: System) -> None:
        buffer = system.buffer(self.piece_bytes, is_filled=True)  # as who reads weights has it
        for at in self.places:
            n_bytes, now_s = self.file.read(buffer, at), time.perf_counter()
            if not self.began_s:
                self.began_s = now_s if now_s >= since_s else 0.0
                continue
            self.n_bytes, self.ended_s = self.n_bytes + n_bytes, now_s
            if now_s >= until_s:
                return

    @property
    def bytes_s(self) -> float:
        return self.n_bytes / (self.ended_s - self.began_s) if self.ended_s > self.began_s else 0.0


def memory_rate(memory_bytes: int) -> float:
    """Bytes that all cores together read from memory in a second; 0 where there is not room enough to tell."""
    if memory_bytes < 2 * MEMORY_BYTES:
        return 0.0
    n_threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(MEMORY_BYTES, np.uint8), n_threads)
    with ThreadPoolExecutor(n_threads) as pool:

        def run(_: int) -> float:
            start = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))  # without the GIL; the quickest that numpy has
            return time.perf_counter() - start

        return MEMORY_BYTES / min(map(run, range(MEMORY_RUNS)))
