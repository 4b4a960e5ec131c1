"""macOS's memory and files: with Mach's answers replaced, and with POSIX's calls for real."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("POSIX's", allow_module_level=True)

from prima_core.memory import posix
from prima_core.memory.darwin import MS_INVALIDATE, Darwin, VmStatistics
from prima_core.memory.system import Memory

COUNTS = {"free_count": 500, "active_count": 9, "speculative_count": 100, "external_page_count": 300}


class Call:
    """A function of a library, to which argument types can be given."""

    def __init__(self, function: Callable[..., int]) -> None:
        self._function = function
        self.argtypes: tuple[Any, ...] = ()  # Any: ctypes has no name for the class of its types
        self.calls: list[tuple[Any, ...]] = []  # Any: a C function's arguments

    def __call__(self, *arguments: Any) -> int:  # Any: a C function's arguments
        self.calls.append(arguments)
        return self._function(*arguments)


def statistics(host: int, what: int, answer: Any, size: Any) -> int:  # Any: ctypes' references
    if (host, what) != (77, 4) or size._obj.value != ctypes.sizeof(VmStatistics) // 4:
        return 4  # KERN_INVALID_ARGUMENT
    for name, count in COUNTS.items():
        setattr(answer._obj, name, count)
    return 0


def on_file(fd: int, what: int, value: int) -> int:
    return 0


@pytest.fixture
def libc() -> SimpleNamespace:
    real = ctypes.CDLL(None)
    return SimpleNamespace(
        mmap=real.mmap,
        msync=Call(lambda begin, n_bytes, flags: 0),
        mach_host_self=lambda: 77,
        host_statistics64=statistics,
    )


@pytest.fixture
def system(libc: Any) -> Darwin:  # Any: in place of a library
    return Darwin(libc, on_file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(1).bytes((1 << 20) + 1234))
    return path


def test_the_layout_of_its_statistics_is_machs() -> None:
    """HOST_VM_INFO64_COUNT is 38."""
    assert ctypes.sizeof(VmStatistics) == 38 * 4
    assert VmStatistics.external_page_count.offset == 136


def test_free_and_file_backed_pages_are_available_and_none_counts_twice(system: Darwin) -> None:
    assert system.memory() == Memory(os.sysconf("SC_PHYS_PAGES") * posix.PAGE, 700 * posix.PAGE)
    assert system.pressure() is None


def test_a_kernel_that_does_not_answer_is_an_error(libc: Any) -> None:  # Any: in place of a library
    libc.host_statistics64 = lambda *arguments: 5
    with pytest.raises(OSError, match="host_statistics64 answers 5"):
        Darwin(libc, on_file).memory()


def test_a_file_is_read_uncached_and_without_reading_ahead(libc: Any, file: Path) -> None:  # Any: as above
    told: list[tuple[int, int]] = []

    def tell(fd: int, what: int, value: int) -> int:
        told.append((what, value))
        return 0

    system = Darwin(libc, tell)
    direct, buffer = system.open_direct(file), system.buffer(1 << 20)
    assert told == [(48, 1), (45, 0)]
    assert direct.alignment == mmap.PAGESIZE
    assert direct.read(buffer, 0) == 1 << 20
    assert bytes(buffer) == file.read_bytes()[: 1 << 20]
    assert direct.read(buffer, 1 << 20) == 1234
    with pytest.raises(ValueError, match="not aligned"):
        direct.read(buffer, 512)
    direct.close()


def test_a_file_system_that_refuses_leaves_no_file_open(libc: Any, file: Path) -> None:  # Any: as above
    def refuse(fd: int, what: int, value: int) -> int:
        raise OSError("no such thing here")

    n_open = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError, match="no such thing"):
        Darwin(libc, refuse).open_direct(file)
    assert len(os.listdir("/dev/fd")) == n_open


def test_whole_pages_of_a_buffer_are_given_back_and_can_be_written_again(system: Darwin) -> None:
    buffer = system.buffer(1 << 20)
    pages = np.asarray(buffer)
    pages[:] = 1
    system.release(buffer[100 : 1 << 19])
    assert (pages[:100] == 1).all()
    assert not pages[mmap.PAGESIZE : 1 << 19].any()
    assert (pages[1 << 19 :] == 1).all()
    pages[:] = 2
    system.release(buffer[:100])  # no whole page
    assert (pages == 2).all()


def test_pages_come_by_touching_and_go_by_invalidating(system: Darwin, libc: Any, file: Path) -> None:  # Any: as above
    with file.open("rb") as open_file:
        data = np.frombuffer(mmap.mmap(open_file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    system.populate(data)
    assert system.resident_bytes(data, file) == len(data)
    system.forget(data)
    system.drop(data[1 : 2 * mmap.PAGESIZE], file, 1)
    assert libc.msync.calls == [(posix.address(data) + mmap.PAGESIZE, mmap.PAGESIZE, MS_INVALIDATE)]
    system.drop(data[1:100], file, 1)
    assert len(libc.msync.calls) == 1
    assert system.resident_bytes(data, file.parent / "not ours, or gone") is None
