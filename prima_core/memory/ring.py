"""Where in a buffer the next run of bytes goes: first in, first out, each in one piece."""

from __future__ import annotations

from collections import deque
from typing import Protocol, TypeVar


class Placed(Protocol):
    """A part of the buffer. `is_over`: nobody needs or writes it any more."""

    @property
    def start(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_over(self) -> bool: ...


P = TypeVar("P", bound=Placed)


class Ring(deque[P]):
    """What is in a buffer of `size` bytes, oldest first. No part straddles the end: what is left there stays unused."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def place(self, n_bytes: int) -> int | None:
        """Where the next `n_bytes` can go now."""
        if not self:
            return 0 if n_bytes <= self.size else None
        first, end = self[0].start, self[-1].start + self[-1].size
        if end > first:  # free: behind the newest, and before the oldest
            if end + n_bytes <= self.size:
                return end
            return 0 if n_bytes <= first else None
        return end if end + n_bytes <= first else None

    def reclaim(self) -> bool:
        """Forget what is over at either end; whether something was."""
        before = len(self)
        while self and self[0].is_over:
            self.popleft()
        while self and self[-1].is_over:
            self.pop()
        return len(self) < before
