"""Other programs on a node's machine: a hog that takes memory, a file that was read, a group that shares some memory.

    with memory_group(2 * 10**9) as group, Hog(group) as hog:
        node = group.popen([sys.executable, "-m", "prima_core", "serve", ...])
        hog.hold(10**9)

Groups are those of Linux, version 1, and want root: `why_no_groups` says what lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from prima_core.memory.system import host

ROOT = Path("/sys/fs/cgroup/memory")
DEADLINE_S = 20.0
_POLL_S = 0.02
_KILL = 9

_MACHINE = """
from dataclasses import replace
from prima_core.cli import main
from prima_core.memory.system import MemoryKind, host
from prima_core.node import node

class Machine(type(host())):
    def memory(self):
        return replace(super().memory(), kind=MemoryKind.MACHINE)

node.host = Machine
main()
"""
GROUP_IS_MACHINE = ("-c", _MACHINE)
"""What Python is told to run `prima` so that it takes the group around it for a machine, of which it leaves more."""


def why_no_groups() -> str:
    """Why no memory group can be made here; "" where one can."""
    if not (ROOT / "memory.limit_in_bytes").exists():
        return "memory groups of version 1 are not mounted"
    return "" if os.access(ROOT, os.W_OK) else "memory groups are for root"


class MemoryGroup:
    """A group of processes, and of the pages of files that they read first, that together take no more than a limit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process inside; the options are those of Popen, of any types."""
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs")]
        return subprocess.Popen([*enter, *command], **options)

    def number(self, file: str) -> int:
        return int((self.folder / file).read_text())

    def facts(self, file: str) -> dict[str, int]:
        lines = (line.split() for line in (self.folder / file).read_text().splitlines())
        return {name: int(value) for name, value in lines}

    @property
    def peak_bytes(self) -> int:
        return self.number("memory.max_usage_in_bytes")

    @property
    def available_bytes(self) -> int:
        """What is free, or holds clean pages of files."""
        stat = self.facts("memory.stat")
        free = self.number("memory.limit_in_bytes") - self.number("memory.usage_in_bytes")
        return free + stat["total_active_file"] + stat["total_inactive_file"]

    @property
    def n_killed(self) -> int:
        """Processes that were killed because the group was full."""
        return self.facts("memory.oom_control")["oom_kill"]

    def remove(self) -> None:
        """End what runs inside. Raises OSError when that does not end."""
        until = time.monotonic() + DEADLINE_S
        while True:
            for process in (self.folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), _KILL)
            try:
                self.folder.rmdir()
                return
            except OSError:  # busy, until the processes have gone
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL_S)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A fresh group, which goes in the end with all that runs inside."""
    folder = ROOT / f"prima-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    group = MemoryGroup(folder)
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        group.remove()


_PIECE_BYTES = 4 << 20
_HOG = f"""
import mmap, sys, time
rate, floor, held = float(sys.argv[1]), int(sys.argv[2]), []

def may_take():
    if not floor:
        return True
    with open("/proc/meminfo") as facts:
        [left] = [int(line.split()[1]) * 1024 for line in facts if line.startswith("MemAvailable:")]
    return left >= floor + {_PIECE_BYTES}

for line in sys.stdin:
    n_pieces = int(line) // {_PIECE_BYTES}
    while len(held) > n_pieces:
        held.pop().close()
    while len(held) < n_pieces and may_take():
        until = time.monotonic() + {_PIECE_BYTES} / rate
        piece = mmap.mmap(-1, {_PIECE_BYTES})
        piece[::mmap.PAGESIZE] = bytes(len(piece) // mmap.PAGESIZE)
        held.append(piece)
        time.sleep(max(0.0, until - time.monotonic()))
    print(len(held) * {_PIECE_BYTES}, flush=True)
"""


class Hog:
    """A program that takes as much memory as it is told, at `bytes_s` at most, and needs it; about 10 MB at the start.

    It stops by itself, with less than it was told, where a machine (Linux) would have less than `floor_bytes` left.
    """

    def __init__(self, group: MemoryGroup | None = None, bytes_s: float = 1e9, floor_bytes: int = 0) -> None:
        command = [sys.executable, "-I", "-S", "-c", _HOG, str(bytes_s), str(floor_bytes)]
        popen = subprocess.Popen if group is None else group.popen
        self._process: subprocess.Popen[bytes] = popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def aim(self, n_bytes: int) -> None:
        """Let it begin to take (or to give back) until it holds so much."""
        pipe = self._pipe(self._process.stdin)
        pipe.write(f"{n_bytes}\n".encode())
        pipe.flush()

    def reached(self) -> int:
        """Wait until it holds what it was told last; the bytes. Raises EOFError when it has ended."""
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise EOFError(f"the hog ended with {self._process.wait()}")
        return int(line)

    def hold(self, n_bytes: int) -> int:
        self.aim(n_bytes)
        return self.reached()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


_LEAST_BYTES_S = 100e6
"""Of a file without blocks: pages that a virtual machine has not had yet were found to come at 400 MB/s."""


class CachedFile:
    """A file of zeros that a program has read once, before: `cached_share` of it is in memory now. It has no blocks on
    the disk, and goes with this object. Kernels that page cold files out (DAMON) take some of it in any case, unless it
    is read now and then."""

    def __init__(self, path: Path, n_bytes: int, group: MemoryGroup | None = None) -> None:
        self._path, self._n_bytes = path, n_bytes
        self._popen = subprocess.Popen if group is None else group.popen
        with path.open("wb") as file:
            file.truncate(n_bytes)
        try:
            self.read()
        except BaseException:
            self.close()
            raise
        self._map = np.memmap(path, np.uint8, "r")

    def read(self) -> None:
        """By a program, as its owner does; what is not in memory comes back."""
        reader: subprocess.Popen[bytes] = self._popen(["cat", str(self._path)], stdout=subprocess.DEVNULL)
        reader.wait(DEADLINE_S + self._n_bytes / _LEAST_BYTES_S)

    def cached_share(self) -> float:
        """Raises OSError where the system does not tell."""
        resident = host().resident_bytes(self._map, self._path)
        if resident is None:
            raise OSError("this system does not tell which pages of a file are in memory")
        return resident / self._n_bytes

    def close(self) -> None:
        self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
