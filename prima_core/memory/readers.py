"""Threads that read from disk what others wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue

from prima_core.errors import ModelError
from prima_core.memory.stacks import Read

ANSWER_S = 60.0
"""A disk that says nothing for so long is as good as broken."""


class Batch:
    """Reads that were asked for together."""

    def __init__(self, n_reads: int) -> None:
        self._n_left = n_reads
        self._lock = threading.Lock()
        self._is_done = threading.Event()
        self._error: ModelError | None = None
        self._deadline = time.monotonic() + ANSWER_S

    def wait(self) -> None:
        """Until all are done. Raises ModelError: one failed, or the disk does not answer."""
        if not self._is_done.wait(max(0.0, self._deadline - time.monotonic())):
            hint = "look at the disk (on Linux: dmesg)"
            raise ModelError(f"the disk did not answer for {ANSWER_S:.0f} s", field="file", hint=hint)
        if self._error is not None:
            raise self._error

    def finish(self, error: ModelError | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._n_left -= 1
            if self._n_left == 0:
                self._is_done.set()


class Readers:
    """`n` threads, until `close`."""

    def __init__(self, n: int) -> None:
        self._queue: SimpleQueue[tuple[Read, Batch] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"expert-reader-{i}", daemon=True) for i in range(n)]
        for thread in self._threads:
            thread.start()

    def submit(self, reads: Iterable[Read]) -> Batch:
        """Begin with them, in this order."""
        reads = list(reads)
        batch = Batch(len(reads))
        for read in reads:
            self._queue.put((read, batch))
        return batch

    def close(self) -> None:
        """Ends when all that was asked for is read. Idempotent."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            read, batch = job
            batch.finish(_failure(read))


def _failure(read: Read) -> ModelError | None:
    try:
        read.run()
    except ModelError as error:
        return error
    return None
