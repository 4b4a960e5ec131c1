"""Messages as files: written under another name and renamed, so that they are there whole or not at all.

An address is `folder:///path`. A file `open` in the folder says that somebody listens; a lock, which the system lifts
when the process dies, that nobody else may. Names of messages are a number, which orders those of a peer, and the peer.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from prima_core.errors import LinkBroken, LinkClosed, LinkTimeout
from prima_core.interfaces import Buffer, Credentials, Limits
from prima_core.ring.sockets import close_at_exit

SCHEME = "folder://"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0002, 0.01  # between two looks into the folder
T = TypeVar("T")
log = logging.getLogger(__name__)


class FolderTransport:
    """Credentials are not asked: who may enter the folder is a friend."""

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> FolderReceiveLink:
        """`folder://` alone asks for a fresh folder."""
        with ExitStack() as exits:
            if address == SCHEME:
                address += tempfile.mkdtemp(prefix="prima-")
                exits.callback(shutil.rmtree, _path(address), ignore_errors=True)
            return FolderReceiveLink(_path(address), limits, exits)

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> FolderSendLink:
        return FolderSendLink(_path(address), limits)


class FolderReceiveLink:
    """One thread receives; any thread may close."""

    def __init__(self, folder: Path, limits: Limits, exits: ExitStack) -> None:
        self._folder, self._limits = folder, limits
        self._found: deque[Path] = deque()
        self._closed, self._closing = threading.Event(), threading.Lock()
        exits.callback(_locked(folder).close)
        for path in (*_listed(folder, ".message"), *_listed(folder, ".part")):  # for a listener that was killed
            path.unlink(missing_ok=True)
        (folder / "open").touch()
        exits.callback((folder / "open").unlink, missing_ok=True)
        close_at_exit(self.close, exits)
        self._exits = exits.pop_all()

    @property
    def address(self) -> str:
        return f"{SCHEME}{self._folder}"

    def receive(self, timeout_s: float) -> memoryview:
        return memoryview(_tried(self._take, timeout_s, self._closed, f"no message at {self.address}"))

    def close(self) -> None:
        self._closed.set()
        with self._closing:
            self._exits.close()

    def _take(self) -> bytes | None:
        if not self._found:  # all that is there now, before what comes meanwhile: fair to every peer
            self._found.extend(sorted(_listed(self._folder, ".message")))
        while self._found:
            path = self._found.popleft()
            if (earlier := _before(path)).exists():  # a listing may miss what came while it was made
                self._found.extendleft([path, earlier])
                continue
            with suppress(FileNotFoundError):
                fits = path.stat().st_size <= self._limits.max_message_bytes
                message = path.read_bytes() if fits else b""
                path.unlink()
                if fits:
                    return message
                log.warning("%s was dropped: it is longer than %d bytes", path, self._limits.max_message_bytes)
        return None


class FolderSendLink:
    """Any thread may send and close."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._name, self._number = uuid4().hex, 0
        self._closed, self._sending = threading.Event(), threading.Lock()

    @property
    def peer(self) -> str:
        return f"{SCHEME}{self._folder}"

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        message = b"".join(parts)
        if len(message) > self._limits.max_message_bytes:
            raise LinkBroken(f"a message of {len(message)} bytes, the limit is {self._limits.max_message_bytes}")
        _tried(lambda: self._put(message), timeout_s, self._closed, f"no room at {self.peer}")

    def close(self) -> None:
        self._closed.set()

    def _put(self, message: bytes) -> bool | None:
        """True, or None where nobody listens or as many messages of ours as may be are waiting."""
        with self._sending:
            n_waiting = len(_listed(self._folder, f"-{self._name}.message"))
            if n_waiting >= self._limits.max_queued or not (self._folder / "open").exists():
                return None
            path = self._folder / f"{self._number:016x}-{self._name}.message"
            try:
                path.with_suffix(".part").write_bytes(message)
                path.with_suffix(".part").rename(path)
            except OSError:  # the listener has just gone, and its folder
                return None
            self._number += 1
            return True


def _tried(attempt: Callable[[], T | None], timeout_s: float, closed: threading.Event, why_not: str) -> T:
    """What the attempt gives as soon as it gives something. Raises LinkTimeout, and LinkClosed as soon as it is."""
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    while not closed.is_set():
        if (result := attempt()) is not None:
            return result
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise LinkTimeout(f"{why_not} within {timeout_s:g} s")
        closed.wait(min(pause_s, left_s))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    raise LinkClosed("the link is closed")


def _path(address: str) -> Path:
    path = Path(address.removeprefix(SCHEME))
    if not address.startswith(SCHEME) or not path.is_absolute():
        raise LinkBroken(f"{address!r} is not a folder address", hint="it looks like folder:///path")
    return path


def _listed(folder: Path, ending: str) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder) if name.endswith(ending)]
    except FileNotFoundError:  # closed just now
        return []


def _before(path: Path) -> Path:
    """The same peer's message before this one."""
    number, _, peer = path.name.partition("-")
    return path.with_name(f"{int(number, 16) - 1:016x}-{peer}")


def _locked(folder: Path) -> sqlite3.Connection:
    """Make the folder, for this user alone, and take its lock: a transaction is one on every system."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_mode & 0o077:
            raise LinkBroken(f"other users can enter {folder}", hint=f"chmod 700 {folder}")
        lock = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise LinkBroken(f"cannot listen in {folder}: {error}", hint="choose another folder") from None
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        lock.close()
        raise LinkBroken(f"somebody listens in {folder} already", hint="choose another folder") from None
    return lock
