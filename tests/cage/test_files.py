"""The model's files: their disk, copies, and a page cache that is proven cold."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest

from prima_core.cage.files import cached_share, check_room, copy_to, direct_rate, disk_of, make_cold
from prima_core.errors import ConfigError
from prima_core.memory import disks

pytestmark = pytest.mark.usefixtures("host")
SIZE = 48 * 2**20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_file_just_written_is_cached_and_then_cold(file: Path) -> None:
    assert cached_share(file) == 1
    make_cold([file])
    assert cached_share(file) == 0


def test_a_file_that_another_keeps_in_memory_is_told(file: Path) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, SIZE, 4096)) > 0
        with pytest.raises(ConfigError, match=r"100% of .*file stays in the page cache"):
            make_cold([file])


def test_copies_are_whole_and_have_the_same_names(file: Path, tmp_path: Path) -> None:
    (copy,) = copy_to(tmp_path / "run" / "a", [file])
    assert (copy.name, copy.read_bytes()) == (file.name, file.read_bytes())


def test_copies_that_would_fill_the_disk_are_refused(file: Path) -> None:
    free = shutil.disk_usage(file.parent).free
    check_room([file], 1)
    with pytest.raises(ConfigError, match=r"copies of the model take .* GB, .* GB free"):
        check_room([file], free // SIZE)


def test_the_disk_of_a_file_is_a_whole_one(file: Path) -> None:
    try:
        disk = disk_of(file)
    except ConfigError as error:
        pytest.skip(str(error))
    assert (Path("/sys/dev/block") / disk).exists()
    assert not (Path("/sys/dev/block") / disk / "partition").exists()


def test_a_partition_is_limited_as_its_disk(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("devices have numbers on other systems")
    device = file.stat().st_dev
    part = tmp_path / "devices" / "sda" / "sda1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1\n")
    (part.parent / "dev").write_text("8:0\n")
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to(part)
    monkeypatch.setattr(disks, "_BLOCKS", tmp_path)
    assert disk_of(file) == "8:0"


def test_a_file_system_without_a_disk_is_told() -> None:
    with pytest.raises(ConfigError, match="without a disk of its own"):
        disk_of(Path("/proc/self/status"))


def test_the_disk_is_measured_by_direct_reads(file: Path) -> None:
    make_cold([file])
    assert direct_rate([file]) > 0
    assert cached_share(file) == 0


def test_a_small_model_cannot_measure_a_disk(model: Path) -> None:
    with pytest.raises(ConfigError, match="the file is too small"):
        direct_rate([model])
