"""Linux's memory and files, for real."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

if sys.platform != "linux":
    pytest.skip("Linux's own", allow_module_level=True)

from prima_core.memory import linux, posix
from prima_core.memory.linux import Linux

SIZE = 8 * 1024 * 1024 + 1234
MARGIN = 64 * 1024
"""What may stay in the page cache: a page at either end, and what the kernel reads with it."""

SYSTEM = Linux()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return cold_file(tmp_path / "weights")


def cold_file(path: Path) -> Path:
    """Random bytes that are on the disk, and of which nothing is cached."""
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    with path.open("rb+") as open_file:
        os.fsync(open_file.fileno())
        os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.fixture
def on_shm() -> Iterator[Path]:
    path = Path("/dev/shm") / f"prima-test-{os.getpid()}"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    yield path
    path.unlink()


def mapped(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def has_direct_reads(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [posix.anonymous(4096)], 0)
    except OSError:
        return False
    os.close(fd)
    return True


# ---------------------------------------------------------------- reads past the page cache


def test_a_direct_read_gives_the_files_bytes_and_caches_nothing(file: Path) -> None:
    if not has_direct_reads(file):
        pytest.skip("this file system has no O_DIRECT")
    data = mapped(file)
    direct, buffer = SYSTEM.open_direct(file), SYSTEM.buffer(1 << 20)
    assert direct.read(buffer, 4 << 20) == 1 << 20
    assert SYSTEM.resident_bytes(data, file) == 0
    assert np.array_equal(np.asarray(buffer), data[4 << 20 : 5 << 20])
    direct.close()


def test_a_read_over_the_end_of_the_file_tells_how_much_was_there(file: Path) -> None:
    direct, buffer = SYSTEM.open_direct(file), SYSTEM.buffer(1 << 20)
    assert direct.read(buffer, 8 << 20) == 1234
    assert bytes(buffer[:1234]) == file.read_bytes()[8 << 20 :]
    assert direct.read(buffer, 12 << 20) == 0
    direct.close()


@pytest.mark.parametrize(("offset", "start"), [(1, 0), (0, 1)], ids=["offset", "address and length"])
def test_a_read_that_is_not_aligned_is_refused(file: Path, offset: int, start: int) -> None:
    direct = SYSTEM.open_direct(file)
    with pytest.raises(ValueError, match="not aligned to"):
        direct.read(SYSTEM.buffer(8192)[start:], offset)
    direct.close()


@pytest.mark.parametrize("wanted", [16 * 1024, 64 * 1024])
def test_buffers_suit_disks_of_large_blocks(file: Path, monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    monkeypatch.setattr(linux, "_alignment", lambda fd: wanted)
    direct = SYSTEM.open_direct(file)
    assert direct.alignment == wanted
    buffers = [SYSTEM.buffer(wanted) for _ in range(8)]
    for number, buffer in enumerate(buffers):
        assert direct.read(buffer, number * wanted) == wanted
    assert b"".join(buffers) == file.read_bytes()[: 8 * wanted]
    direct.close()


def test_short_answers_of_the_system_are_asked_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: real(fd, [parts[0][:8192]], offset))
    direct, buffer = SYSTEM.open_direct(file), SYSTEM.buffer(64 * 1024)
    assert direct.read(buffer, 4096) == 64 * 1024
    assert bytes(buffer) == file.read_bytes()[4096 : 4096 + 64 * 1024]
    direct.close()


def test_where_direct_reads_are_refused_at_open_the_cache_is_used_and_left_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert_reads_and_leaves_nothing(file)


def test_where_direct_reads_are_refused_at_the_first_read_the_cache_is_used_and_left_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, into: memoryview, offset: int, alignment: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(posix, "read_at", refuse)
    assert_reads_and_leaves_nothing(file)


def test_where_statx_says_that_there_are_none_the_cache_is_used_and_left_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> int:
        raise OSError(errno.EINVAL, "the file system has no direct reads")

    monkeypatch.setattr(linux, "_alignment", refuse)
    before = os.listdir("/proc/self/fd")
    assert_reads_and_leaves_nothing(file)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def assert_reads_and_leaves_nothing(file: Path) -> None:
    data = mapped(file)
    direct, buffer = SYSTEM.open_direct(file), SYSTEM.buffer(4 << 20)
    assert direct.read(buffer, 2 << 20) == 4 << 20
    assert direct.read(buffer, 8 << 20) == 1234
    direct.close()
    resident = SYSTEM.resident_bytes(data, file)
    assert resident is not None
    assert resident < MARGIN
    assert np.array_equal(np.asarray(buffer)[1234:], data[(2 << 20) + 1234 : 6 << 20])


def test_a_file_in_memory_can_be_read(on_shm: Path) -> None:
    direct, buffer = SYSTEM.open_direct(on_shm), SYSTEM.buffer(1 << 20)
    assert direct.read(buffer, 4096) == 1 << 20
    assert bytes(buffer) == on_shm.read_bytes()[4096 : 4096 + (1 << 20)]
    direct.close()


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SYSTEM.open_direct(tmp_path / "none")


def test_a_disk_that_fails_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, parts: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    direct = SYSTEM.open_direct(file)
    with pytest.raises(OSError, match="Input/output error"):
        direct.read(SYSTEM.buffer(4096), 0)
    direct.close()


# ---------------------------------------------------------------- pages


def test_a_buffer_takes_memory_when_it_is_written_and_gives_whole_pages_back() -> None:
    buffer = SYSTEM.buffer(16 << 20)
    pages = np.asarray(buffer)
    before = rss()
    pages[:] = 1
    assert rss() - before > 15 << 20
    SYSTEM.release(buffer[100 : 8 << 20])
    assert rss() - before < 9 << 20
    assert (pages[:100] == 1).all()
    assert not pages[4096 : 8 << 20].any()
    assert (pages[8 << 20 :] == 1).all()


def test_a_buffer_that_is_filled_has_large_pages_where_the_machine_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    buffers = [SYSTEM.buffer(16 << 20, is_filled=is_filled) for is_filled in (False, True)]
    welcome = ["hg" in flags_of(posix.address(buffer)) for buffer in buffers]
    assert welcome == [False, True]


def test_a_buffer_that_is_filled_begins_with_a_large_page() -> None:
    buffers = [SYSTEM.buffer(size << 20, is_filled=True) for size in (2, 4, 6)]
    assert [posix.address(buffer) % linux.LARGE_PAGE_BYTES for buffer in buffers] == [0, 0, 0]
    assert [len(buffer) for buffer in buffers] == [2 << 20, 4 << 20, 6 << 20]


def flags_of(address: int) -> list[str]:
    """Of the mapping of this process that an address lies in."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(place, 16) for place in entry.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            return entry.partition("VmFlags:")[2].split()
    raise AssertionError("no such mapping")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * posix.PAGE


def populate(data: NDArray[np.uint8]) -> None:
    SYSTEM.populate(data)


def touch(data: NDArray[np.uint8]) -> None:
    """As on a kernel before 5.14."""
    old = Linux()
    old._pages = OldPages()
    old.populate(data)


class OldPages(posix.Pages):
    def advise(self, begin: int, end: int, advice: int) -> int:
        return errno.EINVAL if advice == linux.MADV_POPULATE_READ else super().advise(begin, end, advice)


both = pytest.mark.parametrize("bring", [populate, touch])


@both
def test_populated_pages_are_in_memory_and_dropped_ones_are_not(file: Path, bring: object) -> None:
    assert callable(bring)
    data = mapped(file)
    assert SYSTEM.resident_bytes(data, file) == 0
    part = data[1000 : (5 << 20) + 17]
    bring(part)
    assert SYSTEM.resident_bytes(part, file) == len(part)
    SYSTEM.drop(part, file, 1000)
    left = SYSTEM.resident_bytes(part, file)
    assert left is not None
    assert left < MARGIN
    assert part.tobytes() == file.read_bytes()[1000 : (5 << 20) + 17]


@both
def test_pages_behind_the_end_of_the_file_are_an_error_and_no_signal(file: Path, bring: object) -> None:
    assert callable(bring)
    data = mapped(file)
    os.truncate(file, 4096)
    with pytest.raises(OSError, match="Bad address"):
        bring(data[1 << 20 : 2 << 20])


@both
def test_nothing_of_nothing_is_populated(file: Path, bring: object) -> None:
    assert callable(bring)
    bring(mapped(file)[:0])


def test_other_threads_run_while_pages_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the call's place another of that library that only another thread can end: with the GIL held it never does."""
    pages, buffer = posix.Pages(), SYSTEM.buffer(4096)
    receive, send = os.pipe()
    read = ctypes.CDLL(None).read
    read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    monkeypatch.setattr(pages, "_madvise", lambda begin, n_bytes, advice: read(receive, begin, n_bytes) - 1)
    thread = threading.Thread(target=os.write, args=(send, b"."))
    thread.start()
    assert pages.advise(posix.address(buffer), posix.address(buffer) + 1, 0) == 0
    thread.join()
    os.close(receive)
    os.close(send)


def test_what_is_forgotten_stays_cached(file: Path) -> None:
    data = mapped(file)
    SYSTEM.populate(data)
    before = rss()
    SYSTEM.forget(data)
    assert rss() < before - (6 << 20)
    assert SYSTEM.resident_bytes(data, file) == len(data)


def test_what_is_dropped_keeps_what_lies_beside_it(file: Path) -> None:
    data = mapped(file)
    SYSTEM.populate(data)
    SYSTEM.drop(data[4096 + 1 : 3 * 4096 - 1], file, 4096 + 1)  # no whole page
    assert SYSTEM.resident_bytes(data, file) == len(data)
    SYSTEM.drop(data[4096 : 3 * 4096], file, 4096)
    assert SYSTEM.resident_bytes(data, file) == len(data) - 2 * 4096


def test_to_drop_pages_of_a_file_that_has_gone_is_no_error(file: Path) -> None:
    data = mapped(file)
    file.unlink()
    SYSTEM.drop(data, file, 0)


FOREIGN = """
import os, sys
from pathlib import Path
from tests.memory.test_linux import SYSTEM, mapped
os.setgroups([]); os.setgid(65534); os.setuid(65534)
path = Path(sys.argv[1])
data = mapped(path)
print(SYSTEM._pages.resident_bytes(data) == len(data), SYSTEM.resident_bytes(data, path))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user takes root")
def test_to_those_who_may_not_write_the_file_its_residency_is_unknown() -> None:
    """The kernel answers them that all is there."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        path = cold_file(Path(folder) / "weights")
        done = subprocess.run(
            [sys.executable, "-c", FOREIGN, path], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.stdout.split() == ["True", "None"], done.stderr


def test_only_what_is_asked_for_is_populated(file: Path) -> None:
    data = mapped(file)
    part = data[3 << 20 : 4 << 20]
    SYSTEM.populate(part)
    assert SYSTEM.resident_bytes(part, file) == len(part)
    assert SYSTEM.resident_bytes(data, file) == len(part)
