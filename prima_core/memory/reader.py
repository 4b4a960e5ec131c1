"""Reading ahead: threads that bring what is used next from disk into a buffer, round after round."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.memory.ring import Ring

if TYPE_CHECKING:
    from prima_core.memory.system import DirectFile

N_READERS = 4
PIECE_BYTES = 4 * 1024 * 1024
"""Of one read. On a virtual disk 1 to 4 MiB, four in flight, reach its full rate."""
STALLED_AFTER_S = 60.0
"""A disk that gives nothing for so long has failed, even if it does not say so."""
_LOOKS = 10  # within that time: a process that was stopped meanwhile has missed one of them only
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Unit:
    """A tensor, or rows of one: a run of bytes of the file with index `part` that must lie in one piece."""

    name: str
    part: int
    offset: int
    n_bytes: int


Stations = Sequence[tuple[Unit, ...]]
"""What is used together, in the order in which it is used, round after round. A station may be empty, and its tuple be
replaced at any time by another: it is looked at when its turn to be read comes."""


def least_buffer(stations: Stations, alignment: int) -> int:
    """What holds any of the stations as a whole wherever its first unit lies, each unit in one piece."""
    least = 0
    for units in stations:
        spans = [_span(unit, alignment)[1] for unit in units]
        least = max(least, sum(spans) + (max(spans) if len(spans) > 1 else 0))
    return least


def _span(unit: Unit, alignment: int) -> tuple[int, int]:
    """Start and length of the range of the file that encloses a unit and that may be read."""
    start = unit.offset // alignment * alignment
    return start, -(-(unit.offset + unit.n_bytes) // alignment) * alignment - start


@dataclass(slots=True, eq=False)
class _Slot:
    """A unit's place in the buffer. `unread` and `in_flight` count pieces."""

    turn: Turn
    unit: Unit
    offset: int  # in the file
    start: int  # in the buffer
    size: int
    unread: int = 0
    in_flight: int = 0

    @property
    def is_over(self) -> bool:
        return self.turn.is_dropped and not self.in_flight


@dataclass(frozen=True, slots=True)
class _Piece:
    slot: _Slot
    begin: int  # from the slot's start
    end: int

    @property
    def n_needed(self) -> int:
        """Bytes that must be there: the file may end before the end of the last aligned block."""
        used = self.slot.unit.offset + self.slot.unit.n_bytes - self.slot.offset
        return min(self.end, used) - self.begin


@dataclass(slots=True, eq=False)
class Turn:
    """A station that is being read, waits or is in use. `units` are cut down to those that have found a place when the
    rest cannot find one."""

    station: int
    units: tuple[Unit, ...]
    slots: list[_Slot] = field(default_factory=list)
    error: tuple[str, str] | None = None  # message and hint
    is_held: bool = False
    is_dropped: bool = False  # or released

    @property
    def is_placed(self) -> bool:
        return len(self.slots) == len(self.units)

    @property
    def is_read(self) -> bool:
        return self.is_placed and not any(slot.unread or slot.in_flight for slot in self.slots)


@dataclass(slots=True)
class ReadCounts:
    """Sums since the start. `reading_s`: at least one read was under way; `seeks`: something else was asked for than
    what came next, so that `vain_bytes` were read for nothing."""

    read_bytes: int = 0
    reading_s: float = 0.0
    stall_s: float = 0.0
    seeks: int = 0
    vain_bytes: int = 0


class ReadAhead:
    """Reads `stations` in cyclic order into `buffer` as far as there is room. `take` and `free` come from one thread.

    The files stay the caller's, and must be open until `close` has returned.
    """

    def __init__(
        self,
        stations: Stations,
        files: Sequence[DirectFile],
        paths: Sequence[Path],
        buffer: memoryview,
        counts: ReadCounts,
    ) -> None:
        self._stations = stations
        self._files, self._paths = files, paths
        self._alignment = max(file.alignment for file in files)
        self._buffer = buffer
        self._bytes: NDArray[np.uint8] = np.frombuffer(buffer.toreadonly(), np.uint8)
        self._counts = counts
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # something may be read
        self._done = threading.Condition(lock)  # something was, or failed
        self._ring: Ring[_Slot] = Ring(len(buffer))
        self._turns: deque[Turn] = deque()  # not taken yet
        self._pieces: deque[_Piece] = deque()
        self._next = 0  # the station to read after those in `_turns`
        self._is_paused = False  # after an error, until somebody asks again
        self._is_closing = False
        self._n_reading = 0
        self._reading_since = 0.0
        self._threads = [
            threading.Thread(target=self._main, name=f"prima-reader-{number}", daemon=True)
            for number in range(N_READERS)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------ of the thread that computes

    def take(self, station: int) -> Turn | None:
        """A station in memory, in use until `free`; None if it is empty. Whatever comes before it is passed over.

        Units that find no room because of what is in use are left out. Raises ModelError for what could not be read;
        the next call tries it again.
        """
        with self._work:
            turn = self._find(station)
            if turn is None:
                return None
            if not turn.is_read:
                self._wait(turn)
            self._turns.popleft()
            if turn.error is not None:
                self._fail(turn)
            turn.is_held = True
            return turn

    def view(self, turn: Turn, index: int) -> NDArray[np.uint8]:
        """The bytes of one of a turn's units, valid until it is freed."""
        slot, unit = turn.slots[index], turn.units[index]
        start = slot.start + unit.offset - slot.offset
        return self._bytes[start : start + unit.n_bytes]

    def free(self, turn: Turn) -> None:
        with self._work:
            turn.is_held, turn.is_dropped = False, True
            self._reclaim()

    # ------------------------------------------------------------ of any thread

    def close(self) -> None:
        """Wakes who waits in `take` (with a ModelError) and ends the threads; one whose disk hangs is left behind.
        Idempotent."""
        with self._work:
            self._is_closing = True
            self._work.notify_all()
            self._done.notify_all()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # ------------------------------------------------------------ with the lock held

    def _find(self, station: int) -> Turn | None:
        """The station's turn, first of those that wait."""
        if any(turn.station == station for turn in self._turns):
            self._counts.seeks += self._drop_before(station)
        elif self._stations[station]:
            comes_next = self._first_of(self._next)
            self._counts.seeks += self._drop_before(None) or comes_next != station
            self._begin(station)
        else:
            return None
        return self._turns[0]

    def _first_of(self, station: int) -> int | None:
        """The first station from this one on that is not empty."""
        n = len(self._stations)
        return next(((station + i) % n for i in range(n) if self._stations[(station + i) % n]), None)

    def _drop_before(self, station: int | None) -> bool:
        """Whether anything was."""
        has_units = False
        while self._turns and self._turns[0].station != station:
            turn = self._turns.popleft()
            has_units |= bool(turn.units)
            self._drop(turn)
        self._reclaim()
        return has_units

    def _drop(self, turn: Turn) -> None:
        turn.is_dropped = True
        self._counts.vain_bytes += sum(slot.size for slot in turn.slots if not slot.unread)
        self._pieces = deque(piece for piece in self._pieces if piece.slot.turn is not turn)

    def _reclaim(self) -> None:
        if self._ring.reclaim():
            self._work.notify_all()

    def _begin(self, station: int) -> None:
        """Let reading go on from a station."""
        self._append(station)
        self._is_paused = False
        self._work.notify_all()

    def _wait(self, turn: Turn) -> None:
        start = time.perf_counter()
        n_idle = 0
        while not (turn.is_read or turn.error or self._is_closing):
            if self._is_stuck(turn):
                turn.units = turn.units[: len(turn.slots)]
                self._work.notify_all()
                continue
            before = self._counts.read_bytes
            is_idle = not self._done.wait(STALLED_AFTER_S / _LOOKS) and self._counts.read_bytes == before
            n_idle = n_idle + 1 if is_idle else 0
            if n_idle == _LOOKS:
                turn.error = self._fault(turn.units[0], f"the disk gave nothing for {STALLED_AFTER_S:.0f} s")
        self._counts.stall_s += time.perf_counter() - start
        if self._is_closing:
            raise ModelError("the weights are not read any more: their store was closed", field="file")

    def _is_stuck(self, turn: Turn) -> bool:
        """Whether the rest of a turn finds no place before something is released that is in use now."""
        if turn.is_placed or any(slot.turn.is_dropped and slot.in_flight for slot in self._ring):
            return False
        return self._ring.place(_span(turn.units[len(turn.slots)], self._alignment)[1]) is None

    def _fail(self, turn: Turn) -> None:
        """Raise a turn's error, and read on only when somebody asks: a broken disk is not asked over and over."""
        self._drop(turn)
        self._drop_before(None)
        self._next, self._is_paused = turn.station, True
        if turn.error is not None:
            raise ModelError(turn.error[0], field="file", hint=turn.error[1])

    def _fault(self, unit: Unit, what: str) -> tuple[str, str]:
        return (
            f"{self._paths[unit.part]} cannot be read at byte {unit.offset} ({unit.name}): {what}",
            "check the disk, or put the whole file back, and start again",
        )

    # ------------------------------------------------------------ of the readers

    def _main(self) -> None:
        while (piece := self._next_piece()) is not None:
            self._read(piece)

    def _next_piece(self) -> _Piece | None:
        """Waits for something to read; None when all is over."""
        with self._work:
            while not self._is_closing:
                if self._pieces or self._place_next():
                    return self._start(self._pieces.popleft())
                self._work.wait()
            return None

    def _place_next(self) -> bool:
        """Find room for the next unit, of the newest turn or of the one after it."""
        turn = self._unplaced()
        if turn is None:
            return False
        unit = turn.units[len(turn.slots)]
        offset, size = _span(unit, self._alignment)
        start = self._ring.place(size)
        if start is None:
            self._done.notify_all()  # who waits for it may be who has the room
            return False
        slot = _Slot(turn, unit, offset, start, size)
        turn.slots.append(slot)
        self._ring.append(slot)
        begins = range(0, size, PIECE_BYTES)
        slot.unread = len(begins)
        self._pieces += [_Piece(slot, begin, min(begin + PIECE_BYTES, size)) for begin in begins]
        return True

    def _unplaced(self) -> Turn | None:
        """The turn with the next unit to read. Empty stations get a turn too: what joins them later comes next time."""
        newest = self._turns[-1] if self._turns else None
        if newest is not None and not newest.is_placed and not newest.error:
            return newest
        if self._is_paused or self._first_of(self._next) is None:
            return None
        while True:
            turn = self._append(self._next)
            if turn.units:
                return turn

    def _append(self, station: int) -> Turn:
        turn = Turn(station, self._stations[station])
        self._turns.append(turn)
        self._next = (station + 1) % len(self._stations)
        return turn

    def _start(self, piece: _Piece) -> _Piece:
        piece.slot.unread -= 1
        piece.slot.in_flight += 1
        self._count_reading(1)
        return piece

    def _count_reading(self, more: int) -> None:
        now = time.perf_counter()
        if self._n_reading:
            self._counts.reading_s += now - self._reading_since
        self._reading_since = now
        self._n_reading += more

    def _read(self, piece: _Piece) -> None:
        slot, n_bytes, what = piece.slot, 0, ""
        into = self._buffer[slot.start + piece.begin : slot.start + piece.end]
        try:
            n_bytes = self._files[slot.unit.part].read(into, slot.offset + piece.begin)
            if n_bytes < piece.n_needed:
                what = "the file ends before its weights: was it truncated?"
        except OSError as error:
            what = error.strerror or str(error)
        except Exception as error:  # noqa: BLE001 - thread top: kept, and raised where the weights are asked for
            what = f"{type(error).__name__}: {error}"
        with self._work:
            self._finish(piece, n_bytes, what)

    def _finish(self, piece: _Piece, n_bytes: int, what: str) -> None:
        slot = piece.slot
        slot.in_flight -= 1
        self._counts.read_bytes += n_bytes
        self._count_reading(-1)
        if what and slot.turn.error is None:
            slot.turn.error = self._fault(slot.unit, what)
            self._pieces = deque(waiting for waiting in self._pieces if waiting.slot.turn is not slot.turn)
        if slot.turn.error or slot.turn.is_read:
            self._done.notify_all()
        if slot.is_over:
            self._reclaim()
            self._done.notify_all()
