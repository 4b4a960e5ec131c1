"""Windows, by calls of kernel32."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import weakref
from collections.abc import Callable
from ctypes import c_char, c_int, c_size_t, c_uint32, c_void_p, c_wchar_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prima_core.memory.system import Memory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.memory.system import DirectFile

PAGE = mmap.PAGESIZE
ALIGNMENT = 4096
"""Sectors are 512 or 4096 bytes."""
_PIECE_BYTES = 4 * 1024 * 1024
_MOST_AT_ONCE = 1 << 30  # of what a read may ask, in 32 bits

GENERIC_READ, SHARE_ALL, OPEN_EXISTING = 0x80000000, 7, 3
FLAG_OVERLAPPED, FLAG_NO_BUFFERING = 0x40000000, 0x20000000
ERROR_HANDLE_EOF, ERROR_INVALID_PARAMETER, ERROR_IO_PENDING = 38, 87, 997
INVALID_HANDLE = c_void_p(-1).value
MEM_COMMIT, MEM_RESERVE, MEM_DECOMMIT, MEM_RELEASE, PAGE_READWRITE = 0x1000, 0x2000, 0x4000, 0x8000, 4


class Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", c_size_t),
        ("internal_high", c_size_t),
        ("offset", c_uint32),
        ("offset_high", c_uint32),
        ("event", c_void_p),
    )


class Range(ctypes.Structure):
    """WIN32_MEMORY_RANGE_ENTRY."""

    _fields_ = (("address", c_void_p), ("n_bytes", c_size_t))


_CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # Any: ctypes has no name for the class of its types
    "CreateFileW": (c_void_p, (c_wchar_p, c_uint32, c_uint32, c_void_p, c_uint32, c_uint32, c_void_p)),
    "CreateEventW": (c_void_p, (c_void_p, c_int, c_int, c_wchar_p)),
    "ReadFile": (c_int, (c_void_p, c_void_p, c_uint32, c_void_p, c_void_p)),
    "GetOverlappedResult": (c_int, (c_void_p, c_void_p, c_void_p, c_int)),
    "CloseHandle": (c_int, (c_void_p,)),
    "GetCurrentProcess": (c_void_p, ()),
    "PrefetchVirtualMemory": (c_int, (c_void_p, c_size_t, c_void_p, c_uint32)),
    "VirtualAlloc": (c_void_p, (c_void_p, c_size_t, c_uint32, c_uint32)),
    "VirtualFree": (c_int, (c_void_p, c_size_t, c_uint32)),
    "VirtualUnlock": (c_int, (c_void_p, c_size_t)),
}


class Windows:
    """`kernel32` and `last_error`: the library, and the error of its last call in this thread."""

    def __init__(self, kernel32: Any = None, last_error: Callable[[], int] | None = None) -> None:  # Any: by ctypes
        self._dll = _load_kernel32() if kernel32 is None else kernel32
        self._last_error = _last_error if last_error is None else last_error
        for name, (result, arguments) in _CALLS.items():
            call = getattr(self._dll, name)
            call.restype, call.argtypes = result, arguments

    def memory(self) -> Memory:
        """Windows counts pages of files that a process has mapped as used: ours are added again, as far as they are
        known, which is what this process's working set has beyond its own memory."""
        import psutil

        machine, own = psutil.virtual_memory(), psutil.Process().memory_info()
        mapped = max(0, own.rss - getattr(own, "private", own.rss))
        return Memory(machine.total, min(machine.total, machine.available + mapped))

    def pressure(self) -> float | None:
        return None

    def open_direct(self, path: Path) -> DirectFile:
        return _UnbufferedFile(self._dll, self._last_error, path)

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        """What is committed counts against memory and page file though it is never written: so only addresses are taken
        for what need not be filled."""
        address = self._allocate(None, n_bytes, MEM_RESERVE | MEM_COMMIT if is_filled else MEM_RESERVE)
        memory = (c_char * n_bytes).from_address(address)
        # at the exit of the process readers may still be at it
        weakref.finalize(memory, self._dll.VirtualFree, address, 0, MEM_RELEASE).atexit = False
        return memoryview(memory).cast("B")

    def claim(self, part: memoryview) -> None:
        """What is committed already stays as it is."""
        begin = _address(part) // PAGE * PAGE
        end = -(-(_address(part) + len(part)) // PAGE) * PAGE
        self._allocate(begin, end - begin, MEM_COMMIT)

    def _allocate(self, address: int | None, n_bytes: int, how: int) -> int:
        got = self._dll.VirtualAlloc(address, n_bytes, how, PAGE_READWRITE)
        if not got:
            raise MemoryError(f"Windows has no {n_bytes} bytes (error {self._last_error()})")
        return int(got)

    def release(self, part: memoryview) -> None:
        begin, end = _whole_pages(_address(part), len(part))
        if begin < end:
            self._dll.VirtualFree(begin, end - begin, MEM_DECOMMIT)

    def populate(self, data: NDArray[np.uint8]) -> None:
        """Reads in large pieces, then into this process. A page that the disk does not give is an OSError of ctypes."""
        scratch = ctypes.create_string_buffer(_PIECE_BYTES)
        for start in range(0, len(data), _PIECE_BYTES):
            address, n_bytes = _address(data.data) + start, min(_PIECE_BYTES, len(data) - start)
            wanted = Range(address, n_bytes)
            self._dll.PrefetchVirtualMemory(self._dll.GetCurrentProcess(), 1, ctypes.byref(wanted), 0)
            ctypes.memmove(scratch, address, n_bytes)  # without the GIL

    def forget(self, data: NDArray[np.uint8]) -> None:
        """To unlock what is not locked takes it out of the working set: so it is documented."""
        begin, end = _whole_pages(_address(data.data), len(data))
        if begin < end:
            self._dll.VirtualUnlock(begin, end - begin)

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None:
        """As `forget`: the system's list of unused pages, which counts as available, keeps them while there is room."""
        self.forget(data)

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        return None  # it tells of the working set alone, and pages that left it may be in memory still


class _UnbufferedFile:
    """Overlapped, so that reads of several threads are under way at once: without, each waits for the one before."""

    alignment = ALIGNMENT

    def __init__(self, dll: Any, last_error: Callable[[], int], path: Path) -> None:  # Any: by ctypes
        self._dll, self._last_error = dll, last_error
        handle = self._open(path, FLAG_OVERLAPPED | FLAG_NO_BUFFERING)
        if handle == INVALID_HANDLE and last_error() == ERROR_INVALID_PARAMETER:  # a network's file system, perhaps
            handle = self._open(path, FLAG_OVERLAPPED)
        if handle == INVALID_HANDLE:
            raise _error(last_error(), path)
        self._handle = handle

    def _open(self, path: Path, flags: int) -> int | None:
        handle = self._dll.CreateFileW(str(path), GENERIC_READ, SHARE_ALL, None, OPEN_EXISTING, flags, None)
        return None if handle is None else int(handle)

    def read(self, into: memoryview, offset: int) -> int:
        address = _address(into)
        if offset % ALIGNMENT or len(into) % ALIGNMENT or address % ALIGNMENT:
            raise ValueError(f"not aligned to {ALIGNMENT}: {len(into)} bytes at {offset} to {address:#x}")
        done = 0
        while done < len(into):
            n_bytes = self._read(address + done, min(_MOST_AT_ONCE, len(into) - done), offset + done)
            done += n_bytes
            if n_bytes == 0 or n_bytes % ALIGNMENT:  # the file's end
                break
        return done

    def _read(self, address: int, n_bytes: int, offset: int) -> int:
        event = self._dll.CreateEventW(None, 1, 0, None)
        if not event:
            raise _error(self._last_error())
        try:
            order = Overlapped(offset=offset & 0xFFFFFFFF, offset_high=offset >> 32, event=event)
            fault = 0
            if not self._dll.ReadFile(self._handle, address, n_bytes, None, ctypes.byref(order)):
                fault = self._last_error()
            if fault not in (0, ERROR_IO_PENDING):
                return self._end_or_error(fault)
            done = c_uint32(0)
            if not self._dll.GetOverlappedResult(self._handle, ctypes.byref(order), ctypes.byref(done), 1):
                return self._end_or_error(self._last_error())
            return done.value
        finally:
            self._dll.CloseHandle(event)

    def _end_or_error(self, fault: int) -> int:
        if fault == ERROR_HANDLE_EOF:
            return 0
        raise _error(fault)

    def close(self) -> None:
        self._dll.CloseHandle(self._handle)


def _address(part: memoryview) -> int:
    import numpy as np  # takes read-only memory too, which ctypes does not

    return int(np.asarray(part).ctypes.data)


def _whole_pages(begin: int, n_bytes: int) -> tuple[int, int]:
    return -(-begin // PAGE) * PAGE, (begin + n_bytes) // PAGE * PAGE


def _error(number: int, path: Path | None = None) -> OSError:
    if sys.platform == "win32":
        return ctypes.WinError(number)
    return OSError(errno.EIO, f"Windows error {number}", path and str(path))


def _last_error() -> int:
    if sys.platform == "win32":
        return ctypes.get_last_error()
    return 0


def _load_kernel32() -> Any:  # Any: by ctypes
    if sys.platform == "win32":
        return ctypes.WinDLL("kernel32", use_last_error=True)
    raise OSError("there is no kernel32 but in Windows")
