"""Control groups: limits hold for real, and both versions get their own files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.cage.groups import Group, Hierarchy, hierarchies, remove_groups
from prima_core.cage.limits import Limits
from prima_core.errors import ClusterError, ConfigError
from prima_core.testing.cluster import until
from tests.cage.conftest import cage_of

LIMITS = Limits(64_000_000, 60_000_000, 0.5, 20_000, 1_000_000, None, 0.0)
MEMORY = "memory = 96000000"
READ_ALL = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer, at = mmap.mmap(-1, 1 << 20), 0
while n := os.preadv(file, [buffer], at):
    at += n
    print(at, flush=True)
print("all", flush=True)
"""
READ_CACHED = """
import sys, time
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
print("all", flush=True)
time.sleep(1000)
"""


def deadline_s() -> float:
    return time.monotonic() + 30


def write_file(path: Path, n_bytes: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(n_bytes))
        os.fsync(file.fileno())
    return path


# ---------------------------------------------------------------- for real


@pytest.mark.usefixtures("host")
def test_a_slow_disk_gives_less_in_the_time_in_which_another_gives_all(tmp_path: Path) -> None:
    file, size = write_file(tmp_path / "file", 32 * 2**20), 32 * 2**20
    slow = f'[[nodes]]\nname = "slow"\n{MEMORY}\ndisk = "200kB/s"\n'
    with cage_of(f'{slow}[[nodes]]\nname = "fast"\n{MEMORY}', file) as cage:
        slow_cell, fast_cell = cage.cells
        command = [sys.executable, "-c", READ_ALL, str(file)]
        cage.start(slow_cell, command, os.environ)
        cage.start(fast_cell, command, os.environ).wait_for("^all$", deadline_s())
        assert fast_cell.group.read_bytes() >= size
        assert slow_cell.group.read_bytes() < size  # all of it would take minutes
        until("first slow read", lambda: slow_cell.group.read_bytes() > 0)


@pytest.mark.usefixtures("host")
def test_who_takes_more_memory_than_there_is_is_killed_and_named(tmp_path: Path) -> None:
    file = write_file(tmp_path / "file", 1 << 20)
    with cage_of(f'[[nodes]]\nname = "small"\n{MEMORY}', file) as cage:
        (cell,) = cage.cells
        program = cage.start(cell, [sys.executable, "-c", "x = bytearray(10**9)"], os.environ)
        with pytest.raises(ClusterError, match="node small was killed because its memory was full"):
            program.wait_for("never", deadline_s())
        assert 0 < cell.group.peak_bytes() <= 96_000_000


@pytest.mark.usefixtures("host")
def test_pages_of_a_file_stay_below_the_limit_and_count_as_available(tmp_path: Path) -> None:
    file = write_file(tmp_path / "file", 200 * 2**20)
    with cage_of(f'[[nodes]]\nname = "small"\n{MEMORY}', file) as cage:
        cage.make_cold()
        (cell,) = cage.cells
        cage.start(cell, [sys.executable, "-c", READ_CACHED, str(file)], os.environ).wait_for("^all$", deadline_s())
        assert cell.group.read_bytes() >= 200 * 2**20
        assert cell.group.peak_bytes() <= 96_000_000
        assert cell.group.available_bytes() > 20_000_000


@pytest.mark.usefixtures("host")
def test_few_cores_are_few(tmp_path: Path) -> None:
    file = write_file(tmp_path / "file", 1 << 20)
    with cage_of(f'[[nodes]]\nname = "lame"\n{MEMORY}\ncores = 0.1\nperiod_ms = 20', file) as cage:
        (cell,) = cage.cells
        (where,) = (hierarchy for hierarchy in hierarchies() if "cpu" in hierarchy.controllers)
        folder = where.root / cell.group.name
        told = "cpu.max" if where.is_v2 else "cpu.cfs_quota_us"
        assert (folder / told).read_text().split()[0] == "2000"
        cage.start(cell, [sys.executable, "-c", "while True: pass"], os.environ)

        def was_held() -> bool:
            facts = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            return int(facts["nr_throttled"]) > 3

        until("the processor to be withheld", was_held)


@pytest.mark.usefixtures("host")
def test_removing_ends_processes_and_their_children() -> None:
    group = Group(f"prima-cage-test-{os.getpid()}.a", hierarchies())
    group.create()
    enter = "".join(f"echo $$ > {entrance}; " for entrance in group.entrances)
    process = subprocess.Popen(["sh", "-c", f"{enter} sleep 1000 & sleep 1000 & wait"])
    try:
        until("both children", lambda: len(group.processes()) == 3)
        remove_groups(group.name)
        assert process.wait(10) == -9
        assert not group.processes()
        assert not any(entrance.parent.exists() for entrance in group.entrances)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- files of both versions


def fake(folder: Path, *lines: str, v2: str = "") -> Path:
    (folder / "v2").mkdir(parents=True)
    (folder / "v2" / "cgroup.controllers").write_text(v2)
    mounts = folder / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n" + "".join(f"{line.replace('@', str(folder))} 0 0\n" for line in lines))
    return mounts


V2 = "cgroup2 @/v2 cgroup2 rw,relatime"


def test_controllers_are_found_in_both_versions(tmp_path: Path) -> None:
    v1 = "cgroup @/memory cgroup rw,relatime,memory"
    mounts = fake(tmp_path, "cgroup @/cpuset cgroup rw,cpuset", v1, V2, v2="cpuset cpu io memory pids")
    assert hierarchies(mounts) == (
        Hierarchy(tmp_path / "memory", False, ("memory",)),
        Hierarchy(tmp_path / "v2", True, ("cpu", "io")),
    )


def test_a_missing_controller_is_told(tmp_path: Path) -> None:
    mounts = fake(tmp_path, "cgroup @/memory cgroup rw,memory", V2, v2="cpu")
    with pytest.raises(ConfigError, match="no control groups for io mounted"):
        hierarchies(mounts)


def v2_group(tmp_path: Path) -> tuple[Group, Path]:
    found = hierarchies(fake(tmp_path, V2, v2="cpu io memory"))
    return Group("run.a", found, "8:0"), tmp_path / "v2"


def test_version_2_gets_its_own_files(tmp_path: Path) -> None:
    group, root = v2_group(tmp_path)
    group.create(LIMITS)
    written = {path.name: path.read_text() for path in (root / "run.a").iterdir()}
    assert written == {
        "memory.max": "64000000",
        "memory.swap.max": "0",
        "cpu.max": "10000 20000",
        "io.max": "8:0 rbps=1000000",
    }
    assert set((root / "cgroup.subtree_control").read_text().split()) == {"+cpu", "+io", "+memory"}
    assert group.entrances == [root / "run.a" / "cgroup.procs"]


def test_version_2_is_read(tmp_path: Path) -> None:
    group, root = v2_group(tmp_path)
    group.create(replace(LIMITS, cores=None, disk_bytes_s=None))
    files = {
        "io.stat": "8:16 rbytes=77 wbytes=1\n8:0 rbytes=1000 wbytes=5 rios=2\n7:0\n",
        "memory.peak": "900\n",
        "memory.current": "64000\n",
        "memory.stat": "anon 5\ninactive_file 1000\nactive_file 7\n",
        "memory.events": "low 0\noom 1\noom_kill 2\n",
        "cgroup.procs": "12\n13\n",
    }
    for name, text in files.items():
        (root / "run.a" / name).write_text(text)
    assert group.read_bytes() == 1000
    assert group.peak_bytes() == 900
    assert group.available_bytes() == 64_000_000 - 64_000 + 1000
    assert group.killed() == 2
    assert group.processes() == {12, 13}


def test_a_group_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    group, root = v2_group(tmp_path)
    (root / "run.a").mkdir()
    with pytest.raises(ConfigError, match=r"cannot make the control group .*run\.a: File exists"):
        group.create(LIMITS)


@pytest.mark.usefixtures("host")
def test_a_limit_that_the_kernel_refuses_is_told() -> None:
    group = Group(f"prima-cage-test-{os.getpid()}.b", hierarchies(), "4095:1")
    try:
        with pytest.raises(ConfigError, match=r"cannot set .* to 4095:1 .*1000000"):
            group.create(LIMITS)
    finally:
        remove_groups(group.name)
