"""What a node finds out about its machine before it joins: quick, and only what plans can use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.model.split import all_parts

if TYPE_CHECKING:
    from prima_core.memory.system import DirectFile, System

log = logging.getLogger(__name__)

MEASURE_S = 0.25
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
    done = [0] * N_READERS
    until_s = time.monotonic() + MEASURE_S

    def read(index: int) -> None:
        part = n_bytes // N_READERS
        buffer, end = system.buffer(PIECE_BYTES, is_filled=True), (index + 1) * part  # as a reader of weights has it
        at = index * part // PIECE_BYTES * PIECE_BYTES
        while time.monotonic() < until_s and at + PIECE_BYTES <= end:
            try:
                done[index] += file.read(buffer, at)
            except OSError as error:
                log.info("the disk could not be measured: %s", error)
                return
            at += PIECE_BYTES

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(N_READERS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, start + GIVE_UP_AFTER_S - time.perf_counter()))
    rate = sum(done) / (time.perf_counter() - start)
    if not any(thread.is_alive() for thread in threads):
        file.close()
    return rate
