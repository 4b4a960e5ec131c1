"""How long a pass takes when nodes read weights from disk while others compute: formulas, plain numbers.

A node keeps all but D = X + B bytes of its weights: X is what its memory lacks, B the buffer that the rest streams
through. While others compute it reads at most B ahead, in each of the v gaps between its visits. So of the D bytes of
a pass max(0, D - v B) are read while it computes or waits. One visit gains nothing by a larger buffer, as D grows as B
does; with more visits all is hidden at B = X / (v - 1), if the disk can read that much in the time of a pass.

That is a bound: reading is perfectly even, visits are evenly spaced. `simulate.py` follows the actual visits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_HALVINGS = 40
_ENOUGH = 1e-9
_ROUNDING = 1 + 1e-9  # buffers are often such that reading takes just as long as the pass


@dataclass(frozen=True, slots=True)
class Reader:
    """A node that streams. `over_bytes`: what its memory lacks (X), `compute_s`: its own computing in a pass.

    Its buffer is from `least_bytes` to `most_bytes`, of which `spare_bytes` take the place of nothing that would have
    to be read ahead then. Readers with the same `disk` share its rate; "": its own.
    """

    over_bytes: int
    n_visits: int
    compute_s: float
    bytes_s: float
    least_bytes: int = 0
    most_bytes: int = 1 << 62
    disk: str = ""
    spare_bytes: int = 0

    def read_s(self, buffer_bytes: float) -> float:
        """What it needs of its disk for a pass."""
        return max(0.0, self.over_bytes + buffer_bytes - self.spare_bytes) / self.bytes_s

    def stall_s(self, buffer_bytes: float) -> float:
        """Its waiting in a pass, when the disk keeps up with the passes."""
        exposed = self.over_bytes - (self.n_visits - 1) * buffer_bytes
        return max(0.0, exposed / self.bytes_s - self.compute_s)

    def buffer_for(self, share: float) -> float:
        """That hides this share of what a buffer can hide, as far as it may be so large or small."""
        wanted = share * self.over_bytes / (self.n_visits - 1) if self.n_visits > 1 else 0.0
        return min(max(wanted, self.least_bytes), self.most_bytes)

    @property
    def corners(self) -> list[float]:
        """The shares, between 0 and 1, from which and up to which its buffer grows."""
        whole = self.over_bytes / max(1, self.n_visits - 1)
        return [size / whole for size in (self.least_bytes, self.most_bytes) if size < whole]


def pass_s(readers: Sequence[Reader], buffers: Sequence[float], rest_s: float) -> float:
    """The time of a pass. `rest_s`: all nodes' computing, and all links."""
    waiting_s = sum(reader.stall_s(size) for reader, size in zip(readers, buffers, strict=True))
    return max(rest_s + waiting_s, reading_s(readers, buffers))


def reading_s(readers: Sequence[Reader], buffers: Sequence[float]) -> float:
    """What the busiest disk needs for a pass."""
    needs: dict[object, float] = {}
    for index, (reader, size) in enumerate(zip(readers, buffers, strict=True)):
        disk = _disk_of(reader, index)
        needs[disk] = needs.get(disk, 0.0) + reader.read_s(size)
    return max(needs.values(), default=0.0)


def _disk_of(reader: Reader, index: int) -> object:
    return reader.disk or index


def best_buffers(readers: Sequence[Reader], rest_s: float) -> list[int]:
    """The buffers with which a pass takes the least time: what they hide, and what reading them costs, in balance."""
    largest = [reader.buffer_for(1.0) for reader in readers]
    low = rest_s + sum(reader.stall_s(size) for reader, size in zip(readers, largest, strict=True))
    if reading_s(readers, largest) <= low:
        return [int(size) for size in largest]
    high = rest_s + sum(reader.over_bytes / reader.bytes_s for reader in readers) + 1e-9
    while not _can_pass(readers, high, rest_s):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        if high - low <= _ENOUGH * high:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if _can_pass(readers, middle, rest_s) else (middle, high)
    return [int(size) for size in _buffers_for(readers, high)]


def _can_pass(readers: Sequence[Reader], time_s: float, rest_s: float) -> bool:
    return pass_s(readers, _buffers_for(readers, time_s), rest_s) <= time_s * _ROUNDING


def _buffers_for(readers: Sequence[Reader], time_s: float) -> list[float]:
    """The largest that help, with which every disk keeps up with passes that take so long."""
    disks: dict[object, list[Reader]] = {}
    for index, reader in enumerate(readers):
        disks.setdefault(_disk_of(reader, index), []).append(reader)
    shares = {disk: _share(sharing, time_s) for disk, sharing in disks.items()}
    return [reader.buffer_for(shares[_disk_of(reader, index)]) for index, reader in enumerate(readers)]


def _share(readers: Sequence[Reader], time_s: float) -> float:
    """How much of what buffers can hide is to be hidden, for readers of one disk. What they read grows with it in
    straight lines from corner to corner, where a reader's buffer begins or ends to grow."""
    corners = sorted({0.0, 1.0, *(corner for reader in readers for corner in reader.corners)})
    at = bisect_right(corners, time_s, key=lambda share: _disk_s(readers, share))
    if at == 0:
        return 0.0
    if at == len(corners):
        return 1.0
    low, high = corners[at - 1], corners[at]
    low_s, high_s = _disk_s(readers, low), _disk_s(readers, high)
    return low + (high - low) * (time_s - low_s) / (high_s - low_s)


def _disk_s(readers: Sequence[Reader], share: float) -> float:
    """What the readers of one disk need for a pass."""
    return sum(reader.read_s(reader.buffer_for(share)) for reader in readers)
