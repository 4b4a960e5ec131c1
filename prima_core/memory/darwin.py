"""macOS."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("there is nothing of this in Windows")

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prima_core.memory import posix
from prima_core.memory.system import Memory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.memory.system import DirectFile

F_RDAHEAD, F_NOCACHE = 45, 48  # sys/fcntl.h; Python's fcntl has them on macOS alone
MS_INVALIDATE = 2
_MAP_FIXED = 0x10


class Darwin:
    """`libc` has what POSIX and Mach offer; `set_on_file(fd, what, value)` is fcntl."""

    def __init__(self, libc: ctypes.CDLL | None = None, set_on_file: Callable[[int, int, int], int] | None = None):
        self._libc = ctypes.CDLL(None, use_errno=True) if libc is None else libc
        self._set_on_file = set_on_file
        self._pages = posix.Pages()
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._host = self._libc.mach_host_self()  # once: each answer is a right that is counted

    def memory(self) -> Memory:
        """What `vm_stat` calls free and file-backed: read ahead and not used yet is in both of the kernel's figures."""
        pages, size = VmStatistics(), ctypes.c_uint32(ctypes.sizeof(VmStatistics) // 4)
        fault = self._libc.host_statistics64(self._host, _HOST_VM_INFO64, ctypes.byref(pages), ctypes.byref(size))
        if fault:
            raise OSError(f"macOS does not tell its memory: host_statistics64 answers {fault}")
        available = pages.free_count - pages.speculative_count + pages.external_page_count
        return Memory(os.sysconf("SC_PHYS_PAGES") * posix.PAGE, available * posix.PAGE)

    def pressure(self) -> float | None:
        return None  # macOS has levels, no shares of time

    def open_direct(self, path: Path) -> DirectFile:
        return _UncachedFile(path, self._set_on_file)

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        return posix.anonymous(n_bytes)

    def claim(self, part: memoryview) -> None:
        """Pages come by themselves."""

    def release(self, part: memoryview) -> None:
        """Map anew: what madvise has there gives pages back at some later time, if at all."""
        begin, end = posix.whole_pages(posix.address(part), len(part))
        if begin < end:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            self._libc.mmap(begin, end - begin, protection, flags, -1, 0)

    def populate(self, data: NDArray[np.uint8]) -> None:
        self._pages.touch(data)

    def forget(self, data: NDArray[np.uint8]) -> None:
        self._pages.advise(*posix.whole_pages(posix.address(data), len(data)), posix.MADV_DONTNEED)

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None:
        begin, end = posix.whole_pages(posix.address(data), len(data))
        if begin < end:
            self._libc.msync(begin, end - begin, MS_INVALIDATE)

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        found = self._pages.resident_bytes(data)
        return found if found < len(data) or posix.is_ours(path) else None


class _UncachedFile:
    """Direct where offset, length and address are whole pages; nothing is kept in any case."""

    alignment = posix.PAGE

    def __init__(self, path: Path, set_on_file: Callable[[int, int, int], int] | None) -> None:
        if set_on_file is None:
            import fcntl

            set_on_file = fcntl.fcntl
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_on_file(self._fd, F_NOCACHE, 1)
            set_on_file(self._fd, F_RDAHEAD, 0)
        except OSError:
            os.close(self._fd)
            raise

    def read(self, into: memoryview, offset: int) -> int:
        posix.check_aligned(into, offset, self.alignment)
        return posix.read_at(self._fd, into, offset, self.alignment)

    def close(self) -> None:
        os.close(self._fd)


_HOST_VM_INFO64 = 4


class VmStatistics(ctypes.Structure):
    """struct vm_statistics64, mach/vm_statistics.h; counts of pages."""

    _fields_ = (
        ("free_count", ctypes.c_uint32),
        ("active_count", ctypes.c_uint32),
        ("inactive_count", ctypes.c_uint32),
        ("wire_count", ctypes.c_uint32),
        ("events", ctypes.c_uint64 * 9),
        ("purgeable_count", ctypes.c_uint32),
        ("speculative_count", ctypes.c_uint32),
        ("compressor_events", ctypes.c_uint64 * 4),
        ("compressor_page_count", ctypes.c_uint32),
        ("throttled_count", ctypes.c_uint32),
        ("external_page_count", ctypes.c_uint32),
        ("internal_page_count", ctypes.c_uint32),
        ("total_uncompressed_pages_in_compressor", ctypes.c_uint64),
    )
