"""The life of a run: whatever it makes on this machine goes with it, however it ends.

All that a run makes has a name that begins with the run's own (control groups, namespaces) or is listed in its folder
(copies of models). A second process, the watcher, holds one end of a pipe and takes all of it away when the run closes
the other end or dies. Both hold a lock: a run whose lock is free has lost its watcher too, and the next run takes its
leftovers away.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prima_core.cage.groups import remove_groups
from prima_core.cage.network import Names, remove_namespaces
from prima_core.errors import ClusterError, ConfigError

FOLDER = Path("/run/prima-cage")
END_WITHIN_S = 40.0


class Run:
    """Open from `begin` to `end`."""

    def __init__(self, folder: Path, lock: int, watcher: subprocess.Popen[bytes]) -> None:
        self.names = Names(folder.name)
        self.cache_folder = folder / "cache"
        self._folder = folder
        self._lock = lock
        self._watcher = watcher

    @classmethod
    def begin(cls) -> Run:
        """Takes leftovers of dead runs away first. Raises ConfigError where this user cannot."""
        try:
            FOLDER.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {FOLDER}: {error.strerror}", hint="run it as root") from error
        with _locked(FOLDER / "lock"):
            remove_leftovers()
            folder = FOLDER / f"prima-cage-{secrets.token_hex(4)}"
            folder.mkdir()
            lock = _take(folder / "lock")
            assert lock is not None  # nobody knows it yet
        return cls(folder, lock, _start_watcher(folder, lock))

    def will_copy_to(self, folder: Path) -> None:
        """Before the folder is made: it goes with the run."""
        with (self._folder / "copies").open("a") as list_:
            print(folder, file=list_, flush=True)

    def end(self) -> None:
        """Take everything away. Raises ClusterError that names what stayed."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        os.close(self._lock)
        try:
            self._watcher.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait()
        if self._folder.exists():  # the watcher was killed, or failed
            _remove_or_tell(self._folder)


def _start_watcher(folder: Path, lock: int) -> subprocess.Popen[bytes]:
    """In a session of its own, where Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "prima_core.cage.life", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(lock,),
        start_new_session=True,
        cwd="/",
    )


def watch(folder: Path) -> None:
    """The watcher's work: wait for the pipe's end, then take all away."""
    sys.stdin.buffer.read()
    remove(folder)


# ---------------------------------------------------------------- taking away


def remove(folder: Path) -> None:
    """All that the run of this folder has made. Raises OSError (TimeoutError) for what stays."""
    prefix = f"{folder.name}."
    remove_groups(prefix)
    remove_namespaces(prefix)
    with suppress(FileNotFoundError):
        for copy in (folder / "copies").read_text().splitlines():
            shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(folder)


def remove_leftovers() -> None:
    """Of runs that died together with their watchers. Raises ClusterError that names what stayed."""
    for folder in FOLDER.glob("prima-cage-*"):
        lock = _take(folder / "lock")
        if lock is not None:
            os.close(lock)
            _remove_or_tell(folder)


def _remove_or_tell(folder: Path) -> None:
    try:
        remove(folder)
    except OSError as error:
        raise ClusterError(
            f"what an emulated cluster made is still there: {error}",
            hint=f"end what uses {folder.name} and run it again, that takes the rest away",
        ) from error


# ---------------------------------------------------------------- locks


def _take(path: Path) -> int | None:
    """An open file that holds the lock; None: another process has it."""
    if sys.platform == "win32":
        raise OSError("clusters are emulated on Linux only")
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time; a run begins in a moment, so another one that begins is told to try again."""
    lock = _take(path)
    if lock is None:
        raise ConfigError("another emulated cluster is just being started", hint="try again in a moment")
    try:
        yield
    finally:
        os.close(lock)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
