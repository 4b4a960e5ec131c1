from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from prima_core.memory.system import DirectFile, System, host
from prima_core.node import measure
from prima_core.node.measure import (
    MEMORY_BYTES,
    N_READERS,
    PIECE_BYTES,
    disk_rate,
    memory_rate,
    random_disk_rate,
)
from prima_core.plan.problem import RANDOM_BYTES

LARGE = (N_READERS + 4) * PIECE_BYTES


@dataclass
class Disk:
    """Files of zeros; `before_read` may wait or raise."""

    before_read: Callable[[], None] = lambda: None
    opened: list[Path] = field(default_factory=list)
    n_open: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)

    def open_direct(self, path: Path) -> DirectFile:
        self.opened.append(path)
        self.n_open += 1
        return cast("DirectFile", self)

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        return memoryview(bytearray(n_bytes))

    def read(self, into: memoryview, offset: int) -> int:
        self.before_read()
        self.reads.append((offset, len(into)))
        return len(into)

    def close(self) -> None:
        self.n_open -= 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0.01)
    monkeypatch.setattr(measure, "MEASURE_S", 0.03)


def file_of(folder: Path, name: str, n_bytes: int) -> Path:
    path = folder / name
    path.touch()
    os.truncate(path, n_bytes)  # takes no room
    return path


def rate(disk: Disk, memory_bytes: int, *paths: Path) -> float:
    return disk_rate(paths, memory_bytes, cast("System", disk))


def test_the_largest_file_is_read(tmp_path: Path) -> None:
    disk, small, large = Disk(), file_of(tmp_path, "small", LARGE), file_of(tmp_path, "large", LARGE + 1)
    assert rate(disk, 1, small, large, tmp_path / "absent", tmp_path) > 0
    assert (disk.opened, disk.n_open) == ([large], 0)


@pytest.mark.parametrize(("n_bytes", "memory_bytes"), [(LARGE, LARGE), (PIECE_BYTES, 1)], ids=["fits", "tiny"])
def test_what_need_not_be_known_is_not_measured(tmp_path: Path, n_bytes: int, memory_bytes: int) -> None:
    disk = Disk()
    assert rate(disk, memory_bytes, file_of(tmp_path, "model", n_bytes)) == 0
    assert rate(disk, memory_bytes) == 0
    assert disk.opened == []


def test_a_disk_that_fails_has_no_rate(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("no")

    disk = Disk(fail)
    assert rate(disk, 1, file_of(tmp_path, "model", LARGE)) == 0
    assert disk.n_open == 0


def test_a_burst_at_the_begin_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURE_S", 1.0)
    now_s = [1.0]

    def go_on() -> None:  # at first ten times as fast
        now_s[0] += 0.002 if now_s[0] < 1.01 else 0.02

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    together = threading.Barrier(N_READERS, go_on)
    disk = Disk(lambda: cast("None", together.wait()))
    assert rate(disk, 1, file_of(tmp_path, "model", LARGE)) == pytest.approx(N_READERS * PIECE_BYTES / 0.02)


@pytest.fixture
def hanging() -> Iterator[Disk]:
    free = threading.Event()
    yield Disk(lambda: cast("None", free.wait()))
    free.set()


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, hanging: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GIVE_UP_AFTER_S", 0.01)
    assert rate(hanging, 1, file_of(tmp_path, "model", LARGE)) == 0
    assert hanging.n_open == 1, "it is in use"


def test_this_machines_disk_has_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(LARGE))
    assert disk_rate([path], 1, host()) > 0
    assert random_disk_rate([path], host()) > 0


def test_pieces_from_anywhere_are_read_too(tmp_path: Path) -> None:
    disk, path = Disk(), file_of(tmp_path, "large", 4 * LARGE)
    assert random_disk_rate([path], cast("System", disk)) > 0
    offsets, sizes = zip(*disk.reads, strict=True)
    assert set(sizes) == {RANDOM_BYTES}
    assert all(offset % RANDOM_BYTES == 0 and offset + RANDOM_BYTES <= 4 * LARGE for offset in offsets)
    assert list(offsets) != sorted(offsets)
    assert random_disk_rate([file_of(tmp_path, "tiny", PIECE_BYTES)], cast("System", disk)) == 0


def test_memory_is_read_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEMORY_BYTES", 1 << 20)
    assert memory_rate(1 << 21) > 0
    assert memory_rate(1 << 20) == 0
    assert MEMORY_BYTES > 1 << 20
