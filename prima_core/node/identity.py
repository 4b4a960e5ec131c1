"""A node that is started again says that it is the same one, so that it has its name back at once."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prima_core.memory.disks import machine_name
from prima_core.node.turns import take_lock

log = logging.getLogger(__name__)

ID_BYTES = 8
_MAX_FILE_BYTES = 1024


@contextmanager
def own_id(folder: Path, name: str) -> Iterator[str]:
    """A random id, at every start of a node of this name on this machine the same one, as long as no other process has
    it: the lock goes with the process that had it, so who has it knows that the other is dead.

    Another one at every start where the folder cannot be written to.
    """
    fresh = secrets.token_hex(ID_BYTES)
    path = folder / "nodes" / hashlib.sha256(name.encode()).hexdigest()[:32]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        log.info("a new start will be taken for another node: %s", error)
        yield fresh
        return
    try:
        yield _kept(file, fresh) if take_lock(file) else fresh
    finally:
        os.close(file)


def _kept(file: int, fresh: str) -> str:
    """What an earlier start on this machine has written (with a copy of its disk another is meant); else `fresh`, which
    is kept."""
    machine = hashlib.sha256(machine_name().encode()).hexdigest()[:32]
    with suppress(OSError):
        id, _, where = os.read(file, _MAX_FILE_BYTES).decode("ascii", "replace").partition(" ")
        if where == machine and len(id) == 2 * ID_BYTES and id.isalnum():
            return id
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, f"{fresh} {machine}".encode())
    return fresh
