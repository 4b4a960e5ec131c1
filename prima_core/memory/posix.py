"""Pages and reads as every POSIX system has them; what Linux and macOS do differently is in their own files."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("there is nothing of this in Windows")

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
MADV_WILLNEED = 3  # POSIX's numbers are the same on Linux and macOS
MADV_DONTNEED = 4
_PIECE_BYTES = 4 * 1024 * 1024


class Pages:
    """The C library's calls on this process's pages. Python's own hold the GIL for as long as the disk takes; ctypes
    frees it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise, self._mincore = libc.madvise, libc.mincore
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

    def advise(self, begin: int, end: int, advice: int) -> int:
        """0, or the error's number."""
        if end <= begin or self._madvise(begin, end - begin, advice) == 0:
            return 0
        return ctypes.get_errno()

    def resident(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Of each page of [begin, end), which are whole pages, whether it is in memory. Raises OSError."""
        found = np.zeros((end - begin) // PAGE, np.uint8)
        if self._mincore(begin, end - begin, found.ctypes.data):
            raise _error(ctypes.get_errno())
        return (found & 1).astype(np.bool_)

    def resident_bytes(self, data: NDArray[np.uint8]) -> int:
        """How much of a view is in memory, as the system tells it. Raises OSError."""
        if not len(data):
            return 0
        begin, end = enclosing_pages(address(data), len(data))
        resident = self.resident(begin, end)
        outside = resident[0] * (address(data) - begin) + resident[-1] * (end - address(data) - len(data))
        return int(resident.sum()) * PAGE - int(outside)

    def touch(self, data: NDArray[np.uint8]) -> None:
        """Bring a view's pages into memory where no call does it: a byte of each goes through a pipe.

        Behind the end of a file the system's copy is an error (EFAULT), where to read the byte would be SIGBUS.
        """
        receive, send = os.pipe()
        try:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                self.advise(*enclosing_pages(address(piece), len(piece)), MADV_WILLNEED)
                _copy_some(piece.data, receive, send)
        finally:
            os.close(receive)
            os.close(send)


def _copy_some(piece: memoryview, receive: int, send: int) -> None:
    """A byte of each page of `piece`, and its last, through the pipe, which has room for a thousand."""
    at_once = 512  # below what every system takes of parts (IOV_MAX) and holds in a pipe
    places = [*range(0, len(piece), PAGE), len(piece) - 1]
    while places:
        done = os.writev(send, [piece[place : place + 1] for place in places[:at_once]])
        os.read(receive, done)
        places = places[done:]


def anonymous(n_bytes: int, alignment: int = 1) -> memoryview:
    """Private zeroed memory, given back with its last view; a page is taken when it is first written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    whole = memoryview(mmap.mmap(-1, n_bytes + alignment - 1, flags=flags))
    skipped = -address(whole) % alignment
    return whole[skipped : skipped + n_bytes]


def read_at(fd: int, into: memoryview, offset: int, alignment: int) -> int:
    """Fill `into`; how many bytes were there. A read that ends between aligned places has reached the file's end, where
    a direct file refuses to be asked again."""
    done = 0
    while done < len(into):
        n_bytes = os.preadv(fd, [into[done:]], offset + done)
        done += n_bytes
        if n_bytes == 0 or n_bytes % alignment:
            break
    return done


def check_aligned(into: memoryview, offset: int, alignment: int) -> None:
    """The system's own word for it, EINVAL, would look like a file system that has no direct reads."""
    if offset % alignment or len(into) % alignment or address(into) % alignment:
        raise ValueError(f"not aligned to {alignment}: {len(into)} bytes at {offset} to {address(into):#x}")


def is_ours(path: Path) -> bool:
    """Whether this process owns a file, or may write it: others are told nothing true of what is in memory."""
    try:
        return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)
    except OSError:  # it has gone since it was mapped
        return False


def address(data: NDArray[np.uint8] | memoryview) -> int:
    return int(np.asarray(data).ctypes.data)


def whole_pages(begin: int, n_bytes: int) -> tuple[int, int]:
    """The pages that lie inside [begin, begin + n_bytes); the end may be before the begin: none."""
    return -(-begin // PAGE) * PAGE, (begin + n_bytes) // PAGE * PAGE


def enclosing_pages(begin: int, n_bytes: int) -> tuple[int, int]:
    return begin // PAGE * PAGE, -(-(begin + n_bytes) // PAGE) * PAGE


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def check_populated(number: int) -> bool:
    """Whether a call that populates has done it; False: the system does not know it. Raises OSError for pages behind
    the end of the file, a disk that fails, no memory."""
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    if number:
        raise _error(number)
    return True
