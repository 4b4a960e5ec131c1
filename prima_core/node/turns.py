"""Nodes of one machine take turns when they measure it: a lock on a file, which goes with the process."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_LOOK_S = 0.05


@contextmanager
def turn(path: Path, within_s: float, stop: Callable[[], bool]) -> Iterator[None]:
    """The block runs while no other process has the lock; when `within_s` have passed, or the file cannot be made, it
    runs all the same: a figure that others disturbed is better than none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        log.info("measuring without taking turns: %s", error)
        yield
        return
    try:
        until_s = time.monotonic() + within_s
        while not take_lock(file) and not stop() and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(file)


def take_lock(file: int) -> bool:
    """Whether this process has the lock on an open file now, until it closes it or ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it
        return False
    return True
