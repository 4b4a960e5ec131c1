"""Linux, and Android, which is one."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("there is nothing of this in Windows")

import ctypes
import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.memory import cgroups, posix
from prima_core.memory.system import Memory, MemoryKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.memory.system import DirectFile

MADV_HUGEPAGE = 14
MADV_POPULATE_READ = 22  # since 5.14
O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0: another system, or a build without it
FADV_RANDOM, FADV_DONTNEED = 1, 4  # s390 has others, and no prima
SAFE_ALIGNMENT = 4096
MOST_ALIGNMENT = 64 * 1024
"""As every buffer is; a disk that wants more is read through the page cache."""
LARGE_PAGE_BYTES = 2 * 1024 * 1024
"""Where a buffer lies across them, its ends are small pages: reads of 4 MiB into such were a third slower."""
_PIECE_BYTES = 4 * 1024 * 1024
_CAP_FOWNER = 3


class Linux:
    """`proc`: where the kernel tells of itself. `is_phone`: Android's."""

    def __init__(self, proc: Path = Path("/proc"), is_phone: bool | None = None) -> None:
        self._proc = proc
        self._kind = MemoryKind.PHONE if (is_android() if is_phone is None else is_phone) else MemoryKind.MACHINE
        self._pages = posix.Pages()

    def memory(self) -> Memory:
        facts = cgroups.key_values((self._proc / "meminfo").read_text())
        mapped = max(0, facts.get("Mapped", 0) - facts.get("Shmem", 0))
        machine = Memory(facts["MemTotal"] * 1024, facts["MemAvailable"] * 1024, mapped * 1024, self._kind)
        if self._kind is MemoryKind.PHONE:  # its groups are the system's own and tell an app nothing
            return machine
        groups = [group for group in cgroups.limits(self._proc) if group.total_bytes < machine.total_bytes]
        return min(machine, *groups, key=lambda memory: memory.free_bytes) if groups else machine

    def pressure(self) -> float | None:
        files = [self._proc / "pressure" / "memory", *cgroups.pressure_files(self._proc)]
        told = [share for path in files if (share := _pressure(path)) is not None]
        return max(told, default=None)

    def open_direct(self, path: Path) -> DirectFile:
        return _DirectFile(path)

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        is_large = is_filled and n_bytes >= LARGE_PAGE_BYTES
        buffer = posix.anonymous(n_bytes, LARGE_PAGE_BYTES if is_large else MOST_ALIGNMENT)
        if is_large:  # a system without large pages refuses, and gives small ones
            self._pages.advise(*posix.whole_pages(posix.address(buffer), n_bytes), MADV_HUGEPAGE)
        return buffer

    def claim(self, part: memoryview) -> None:
        """Pages come by themselves."""

    def release(self, part: memoryview) -> None:
        self._pages.advise(*posix.whole_pages(posix.address(part), len(part)), posix.MADV_DONTNEED)

    def populate(self, data: NDArray[np.uint8]) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            begin, end = posix.enclosing_pages(posix.address(piece), len(piece))
            # To populate alone reads megabytes around a cold piece too, into the page cache; this reads the piece.
            self._pages.advise(begin, end, posix.MADV_WILLNEED)
            if not posix.check_populated(self._pages.advise(begin, end, MADV_POPULATE_READ)):
                self._pages.touch(data[start:])
                return

    def forget(self, data: NDArray[np.uint8]) -> None:
        self._pages.advise(*posix.whole_pages(posix.address(data), len(data)), posix.MADV_DONTNEED)

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None:
        self.forget(data)
        begin, end = posix.whole_pages(offset, len(data))
        if begin < end:
            _drop_cached(path, begin, end)

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        found = self._pages.resident_bytes(data)
        # To those who may not write a file mincore answers that all of it is there: any other answer is true.
        return found if found < len(data) or self._may_know(path) else None

    def _may_know(self, path: Path) -> bool:
        """The kernel's rule (mm/mincore.c): who has CAP_FOWNER, the owner, who may write."""
        status = (self._proc / "self" / "status").read_text()
        return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_FOWNER & 1) or posix.is_ours(path)


class _DirectFile:
    def __init__(self, path: Path) -> None:
        self._is_direct, self.alignment = True, SAFE_ALIGNMENT
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._go_through_the_cache()
            return
        try:
            self.alignment = _alignment(self._fd)
        except OSError:
            self._go_through_the_cache()

    def read(self, into: memoryview, offset: int) -> int:
        posix.check_aligned(into, offset, self.alignment)
        if self._is_direct:
            try:
                return posix.read_at(self._fd, into, offset, self.alignment)
            except OSError as error:
                if error.errno != errno.EINVAL:  # some file systems say only now that they cannot
                    raise
                self._go_through_the_cache()
        return _read_and_drop(self._fd, into, offset)

    def close(self) -> None:
        os.close(self._fd)

    def _go_through_the_cache(self) -> None:
        import fcntl

        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~O_DIRECT)
        _advise_file(self._fd, 0, 0, FADV_RANDOM)  # nothing behind what is read: it would stay
        self._is_direct = False


def _read_and_drop(fd: int, into: memoryview, offset: int) -> int:
    """Read through the page cache and take what was read out of it. Pages that someone has mapped stay in any case; to
    spare unmapped ones that were there before was tried: the kernel's reading ahead makes them look alike."""
    done = 0
    while done < len(into):
        n_bytes = os.preadv(fd, [into[done : done + _PIECE_BYTES]], offset + done)
        if n_bytes == 0:
            break
        _advise_file(fd, *posix.whole_pages(offset + done, n_bytes), FADV_DONTNEED)
        done += n_bytes
    return done


def _drop_cached(path: Path, begin: int, end: int) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # the file has gone: so will its pages
        return
    try:
        _advise_file(fd, begin, end, FADV_DONTNEED)
    finally:
        os.close(fd)


def _advise_file(fd: int, begin: int, end: int, advice: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(fd, begin, max(0, end - begin), advice)


# ---------------------------------------------------------------- what a file wants of direct reads


class _Statx(ctypes.Structure):
    """The head of struct statx (linux/stat.h) up to what is asked here."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 148),
        ("memory_alignment", ctypes.c_uint32),
        ("offset_alignment", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 96),
    )


_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # since 6.1


def _alignment(fd: int) -> int:
    """What direct reads of a file want, at least a page of any disk. Raises OSError (EINVAL) where there are none."""
    answer = _Statx()
    try:
        statx = ctypes.CDLL(None).statx
    except AttributeError:  # an old C library
        return SAFE_ALIGNMENT
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, ctypes.byref(answer)) or not answer.mask & _STATX_DIOALIGN:
        return SAFE_ALIGNMENT
    wanted = int(max(SAFE_ALIGNMENT, answer.memory_alignment, answer.offset_alignment))
    if not answer.offset_alignment or wanted > MOST_ALIGNMENT:
        raise OSError(errno.EINVAL, "the file system has no direct reads, or odd ones")
    return wanted


# ---------------------------------------------------------------- what it tells of itself


def is_android() -> bool:
    return hasattr(sys, "getandroidapilevel") or "ANDROID_ROOT" in os.environ


def _pressure(path: Path) -> float | None:
    """Of `some avg10=1.23 avg60=...`, in per cent; None where the kernel does not count it, or not for us."""
    try:
        text = path.read_text()
    except OSError:
        return None
    found = re.search(r"^some avg10=([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) / 100 if found else None
