"""Windows' memory and files over a kernel32 in Python, which checks what it is given as ctypes would."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from prima_core.memory.slots import Slots
from prima_core.memory.system import Memory
from prima_core.memory.windows import (
    ERROR_HANDLE_EOF,
    ERROR_INVALID_PARAMETER,
    ERROR_IO_PENDING,
    FLAG_NO_BUFFERING,
    FLAG_OVERLAPPED,
    INVALID_HANDLE,
    Windows,
)

SIZE = (1 << 20) + 1234
COMMIT, RESERVE, DECOMMIT, RELEASE = 0x1000, 0x2000, 0x4000, 0x8000


class Call:
    """A function of the library: wrong arguments are refused, as by ctypes."""

    def __init__(self, function: Callable[..., int | None]) -> None:
        self._function = function
        self.argtypes: tuple[Any, ...] = ()  # Any: ctypes has no name for the class of its types
        self.restype: Any = None  # Any: as above
        self.calls: list[tuple[Any, ...]] = []  # Any: a C function's arguments

    def __call__(self, *arguments: Any) -> int | None:  # Any: as above
        assert len(arguments) == len(self.argtypes)
        for type_, argument in zip(self.argtypes, arguments, strict=True):
            type_.from_param(argument)
            if isinstance(argument, int):
                assert type_(argument).value in (argument, None), f"{argument} does not fit {type_}"
        self.calls.append(arguments)
        return self._function(*arguments)


class Kernel32:
    def __init__(self, file: Path, *, has_unbuffered: bool = True, is_pending: bool = True) -> None:
        self.error = 0
        self._file, self._has_unbuffered, self._is_pending = file, has_unbuffered, is_pending
        self._memory: dict[int, mmap.mmap] = {}
        self._results: dict[int, tuple[int, int]] = {}
        self.open_handles = 0
        self.fails_with = 0
        self.is_full = False
        for name in ("CreateFileW", "CreateEventW", "ReadFile", "GetOverlappedResult", "CloseHandle"):
            setattr(self, name, Call(getattr(self, f"_{name}")))
        self.VirtualAlloc, self.VirtualFree = Call(self._alloc), Call(lambda address, n_bytes, how: 1)
        self.VirtualUnlock = Call(lambda begin, n_bytes: 0)
        self.PrefetchVirtualMemory = Call(lambda process, n_ranges, ranges, flags: 0)
        self.GetCurrentProcess = Call(lambda: INVALID_HANDLE)  # the same number

    def last_error(self) -> int:
        return self.error

    def _CreateFileW(self, path: str, access: int, share: int, _: None, how: int, flags: int, __: None) -> int | None:
        assert (access, share, how, flags & FLAG_OVERLAPPED) == (0x80000000, 7, 3, FLAG_OVERLAPPED)
        if flags & FLAG_NO_BUFFERING and not self._has_unbuffered:
            self.error = ERROR_INVALID_PARAMETER
            return INVALID_HANDLE
        if path != str(self._file):
            self.error = 2  # no such file
            return INVALID_HANDLE
        self.open_handles += 1
        return 42

    def _CreateEventW(self, _: None, is_manual: int, is_set: int, name: None) -> int:
        assert (is_manual, is_set) == (1, 0)
        self.open_handles += 1
        return 43

    def _ReadFile(self, handle: int, address: int, n_bytes: int, _: None, order: Any) -> int:  # Any: a reference
        assert (handle, order._obj.event) == (42, 43)
        offset = order._obj.offset + (order._obj.offset_high << 32)
        with self._file.open("rb") as file:
            file.seek(offset)
            data = file.read(n_bytes)
        ctypes.memmove(address, data, len(data))
        fault = self.fails_with or (0 if data else ERROR_HANDLE_EOF)
        self._results[ctypes.addressof(order._obj)] = (len(data), fault)
        self.error = ERROR_IO_PENDING if self._is_pending else fault
        return int(not self._is_pending and not fault)

    def _GetOverlappedResult(self, handle: int, order: Any, done: Any, is_waiting: int) -> int:  # Any: references
        assert (handle, is_waiting) == (42, 1)
        done._obj.value, self.error = self._results[ctypes.addressof(order._obj)]
        return int(not self.error)

    def _CloseHandle(self, handle: int) -> int:
        self.open_handles -= 1
        return 1

    def _alloc(self, at: int | None, n_bytes: int, how: int, protection: int) -> int | None:
        assert (at is None, how, protection) in ((True, RESERVE, 4), (True, RESERVE | COMMIT, 4), (False, COMMIT, 4))
        if n_bytes > 1 << 40 or self.is_full:
            self.error = 8
            return None
        if at is not None:
            return at
        memory = mmap.mmap(-1, n_bytes)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self._memory[address] = memory
        return address


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    return path


def system_of(kernel32: Kernel32) -> Windows:
    return Windows(kernel32, kernel32.last_error)


@pytest.mark.parametrize("is_pending", [True, False], ids=["later", "at once"])
@pytest.mark.parametrize("has_unbuffered", [True, False], ids=["unbuffered", "refused"])
def test_a_file_is_read_past_the_cache_where_that_can_be(file: Path, has_unbuffered: bool, is_pending: bool) -> None:
    kernel32 = Kernel32(file, has_unbuffered=has_unbuffered, is_pending=is_pending)
    system = system_of(kernel32)
    direct, buffer = system.open_direct(file), system.buffer(1 << 20)
    assert direct.read(buffer, 4096) == SIZE - 4096
    assert bytes(buffer[: SIZE - 4096]) == file.read_bytes()[4096:]
    assert direct.read(buffer, 1 << 21) == 0
    direct.close()
    assert kernel32.open_handles == 0


def test_places_behind_four_gigabytes_are_reached(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as sparse:
        sparse.seek(5 << 30)
        sparse.write(b"end")
    system = system_of(Kernel32(path))
    buffer = system.buffer(4096)
    assert system.open_direct(path).read(buffer, 5 << 30) == 3
    assert bytes(buffer[:3]) == b"end"


def test_a_read_that_is_not_aligned_is_refused(file: Path) -> None:
    system = system_of(Kernel32(file))
    with pytest.raises(ValueError, match="not aligned to 4096"):
        system.open_direct(file).read(system.buffer(8192)[:4096], 512)


def test_a_file_that_is_not_there_is_an_error(file: Path) -> None:
    with pytest.raises(OSError, match="Windows error 2"):
        system_of(Kernel32(file)).open_direct(file.parent / "none")


@pytest.mark.parametrize("is_pending", [True, False], ids=["later", "at once"])
def test_a_disk_that_fails_is_an_error_and_no_event_is_left(file: Path, is_pending: bool) -> None:
    kernel32 = Kernel32(file, is_pending=is_pending)
    system = system_of(kernel32)
    direct = system.open_direct(file)
    kernel32.fails_with = 23  # ERROR_CRC
    with pytest.raises(OSError, match="Windows error 23"):
        direct.read(system.buffer(4096), 0)
    assert kernel32.open_handles == 1


def test_a_buffer_is_freed_with_its_last_view(file: Path) -> None:
    kernel32 = Kernel32(file)
    system = system_of(kernel32)
    buffer = system.buffer(1 << 20)
    part = buffer[4096:]
    address = int(np.asarray(buffer).ctypes.data)
    del buffer
    gc.collect()
    assert kernel32.VirtualFree.calls == []
    system.release(part[100 : 3 * mmap.PAGESIZE])
    assert kernel32.VirtualFree.calls == [(address + 4096 + mmap.PAGESIZE, 2 * mmap.PAGESIZE, DECOMMIT)]
    system.release(part[:10])
    assert len(kernel32.VirtualFree.calls) == 1
    del part
    gc.collect()
    assert kernel32.VirtualFree.calls[1:] == [(address, 0, RELEASE)]


def test_memory_for_experts_is_taken_slot_by_slot(file: Path) -> None:
    kernel32, page = Kernel32(file), mmap.PAGESIZE
    slots = Slots([3 * page // 2], 4, system_of(kernel32))
    [(_, n_bytes, how, _)] = kernel32.VirtualAlloc.calls
    assert (n_bytes, how) == (6 * page, RESERVE)
    begin = int(slots.data[0].ctypes.data)
    slots.claim(1)
    assert kernel32.VirtualAlloc.calls[1:] == [(begin + page, 2 * page, COMMIT, 4)]
    slots.release(1)
    assert kernel32.VirtualFree.calls == [(begin + 2 * page, page, DECOMMIT)]
    kernel32.is_full = True
    with pytest.raises(MemoryError, match="error 8"):
        slots.claim(2)


def test_a_buffer_that_is_filled_has_its_memory_at_once(file: Path) -> None:
    kernel32 = Kernel32(file)
    system_of(kernel32).buffer(4096, is_filled=True)
    assert [how for _, _, how, _ in kernel32.VirtualAlloc.calls] == [RESERVE | COMMIT]


def test_no_room_for_a_buffer_is_an_error(file: Path) -> None:
    with pytest.raises(MemoryError, match="error 8"):
        system_of(Kernel32(file)).buffer(1 << 41)


def test_pages_of_a_map_are_read_ahead_then_touched_and_leave_the_working_set(file: Path) -> None:
    kernel32 = Kernel32(file)
    system = system_of(kernel32)
    with file.open("rb") as open_file:
        data = np.frombuffer(mmap.mmap(open_file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    system.populate(data)
    [(_, n_ranges, wanted, _)] = kernel32.PrefetchVirtualMemory.calls
    assert (n_ranges, wanted._obj.address, wanted._obj.n_bytes) == (1, data.ctypes.data, len(data))
    system.drop(data[1:], file, 1)
    whole = SIZE // mmap.PAGESIZE - 1
    assert kernel32.VirtualUnlock.calls == [(data.ctypes.data + mmap.PAGESIZE, whole * mmap.PAGESIZE)]
    assert system.resident_bytes(data, file) is None


def test_our_own_mapped_pages_count_as_available(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=300))
    own = SimpleNamespace(rss=250, private=50)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: own))
    system = system_of(Kernel32(file))
    assert system.memory() == Memory(1000, 500)
    own.private = 400  # much of it swapped out
    assert system.memory() == Memory(1000, 300)
    assert system.pressure() is None
