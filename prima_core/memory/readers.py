"""Threads that read from disk what somebody waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from prima_core.errors import ModelError
from prima_core.memory.reader import JOIN_S, N_READERS, PIECE_BYTES, STALLED_AFTER_S
from prima_core.memory.slots import Read
from prima_core.memory.system import System


class Batch:
    """Reads that were asked for together."""

    def __init__(self, n_reads: int) -> None:
        self.n_left = n_reads
        self.error: ModelError | None = None
        self.is_done = threading.Event()
        self.afterwards: Callable[[], None] | None = None
        self._deadline = time.monotonic() + STALLED_AFTER_S

    def wait(self) -> None:
        """Until all are done. Raises ModelError: one failed, or the disk does not answer."""
        if not self.is_done.wait(max(0.0, self._deadline - time.monotonic())):
            hint = "check the disk, and start again"
            raise ModelError(f"the disk gave nothing for {STALLED_AFTER_S:.0f} s", field="file", hint=hint)
        if self.error is not None:
            raise self.error


class Readers:
    """`read_bytes`, in `reading_s` seconds in which at least one read was under way: sums since the start."""

    def __init__(self, alignment: int, system: System) -> None:
        self.read_bytes = 0
        self.reading_s = 0.0
        self._n_left = 0
        self._reading_since = 0.0
        self._lock = threading.Lock()
        self._reads: deque[tuple[Read, Batch]] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # True: look for reads; few, as each costs a change of threads
        self._threads = [
            threading.Thread(target=self._main, args=(scratch,), name=f"prima-reader-of-experts-{i}", daemon=True)
            for i, scratch in enumerate(
                system.buffer(PIECE_BYTES + 2 * alignment, is_filled=True) for _ in range(N_READERS)
            )
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, reads: Sequence[Read]) -> Batch:
        """Begin with them, in this order, after those before."""
        batch = Batch(len(reads))
        with self._lock:
            if not self._n_left:
                self._reading_since = time.monotonic()
            self._n_left += len(reads)
        self._reads.extend((read, batch) for read in reads)
        for _ in self._threads[: len(reads)]:
            self._calls.put(True)
        return batch

    def when_done(self, batch: Batch, call: Callable[[], None]) -> None:
        """For who has stopped waiting: `call` when none of the batch is under way any more; at once, or by a reader."""
        with self._lock:
            if batch.n_left:
                batch.afterwards = call
                return
        call()

    def close(self) -> None:
        """Ends the threads; what none has begun fails, and one whose disk hangs is left behind. Idempotent."""
        while self._reads:
            with suppress(IndexError):  # a thread was faster
                read, batch = self._reads.popleft()
                self._finish(batch, 0, read.fault("the store was closed"))
        for _ in self._threads:
            self._calls.put(False)
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def _main(self, scratch: memoryview) -> None:
        while self._calls.get():
            while self._reads:
                try:
                    read, batch = self._reads.popleft()
                except IndexError:  # another thread was faster
                    break
                try:
                    self._finish(batch, read.run(scratch), None)
                except ModelError as error:
                    self._finish(batch, 0, error)
                except Exception as error:  # noqa: BLE001 - thread top: raised where the experts are asked for
                    self._finish(batch, 0, read.fault(f"{type(error).__name__}: {error}"))

    def _finish(self, batch: Batch, n_bytes: int, error: ModelError | None) -> None:
        with self._lock:
            self.read_bytes += n_bytes
            self._n_left -= 1
            if not self._n_left:
                self.reading_s += time.monotonic() - self._reading_since
            batch.error = batch.error or error
            batch.n_left -= 1
            afterwards = None if batch.n_left else batch.afterwards
            if not batch.n_left:
                batch.is_done.set()
        if afterwards is not None:
            afterwards()
