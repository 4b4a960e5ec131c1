"""Memory limits of control groups: version 1 for real where the machine has it, both as trees of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Linux's own", allow_module_level=True)

from prima_core.memory.cgroups import limiting_reads, slowing
from prima_core.memory.linux import Linux
from prima_core.memory.system import Memory, MemoryKind

GB = 10**9
MACHINE = Memory(16_000_000 * 1024, 9_000_000 * 1024, 300_000 * 1024, MemoryKind.MACHINE)
MEMINFO = """MemTotal: 16000000 kB
MemAvailable: 9000000 kB
Mapped: 400000 kB
Shmem: 100000 kB
HugePages_Total: 0
"""
UNLIMITED = 9223372036854771712


class Tree:
    """A /proc and the groups' file systems, as files."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.fs = folder / "a b"  # the kernel escapes the blank
        self.file(self.proc / "meminfo", MEMINFO)
        self.file(self.proc / "self" / "cgroup", "0::/\n")
        self.file(self.proc / "self" / "mountinfo", "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n")

    def file(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mounted(self, group: str, mount: str, root: str = "/") -> None:
        """`group`: a line of /proc/self/cgroup; `mount`: the kind of file system and its options."""
        kind, _, options = mount.partition(" ")
        place = str(self.fs).replace(" ", "\\040")
        self.file(self.proc / "self" / "cgroup", f"9:cpu,cpuacct:/elsewhere\n{group}\n")
        self.file(
            self.proc / "self" / "mountinfo",
            f"30 22 0:27 {root} {place}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"31 22 0:28 {root} {place} rw,nosuid shared:9 - {kind} {kind} {options}\n",
        )

    def version_2(
        self, path: str, limit: str, current: int, files: tuple[int, int] = (0, 0), high: str = "max"
    ) -> None:
        folder = self.fs / path
        self.file(folder / "memory.max", f"{limit}\n")
        self.file(folder / "memory.high", f"{high}\n")
        self.file(folder / "memory.current", f"{current}\n")
        mapped = "file_mapped 50\nshmem 20\n"
        self.file(folder / "memory.stat", f"anon 7\nactive_file {files[0]}\ninactive_file {files[1]}\n{mapped}")

    def version_1(self, path: str, limit: int, usage: int, files: tuple[int, int] = (0, 0)) -> None:
        folder = self.fs / path
        self.file(folder / "memory.limit_in_bytes", f"{limit}\n")
        self.file(folder / "memory.usage_in_bytes", f"{usage}\n")
        stat = f"active_file 1\ninactive_file 1\ntotal_active_file {files[0]}\ntotal_inactive_file {files[1]}\n"
        self.file(folder / "memory.stat", f"{stat}total_mapped_file 70\ntotal_shmem 30\nmapped_file 1\n")

    def memory(self) -> Memory:
        return Linux(self.proc, is_phone=False).memory()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


V1, V2 = "cgroup rw,memory", "cgroup2 rw,nsdelegate"


def test_without_a_limit_the_machine_is_what_counts(tree: Tree) -> None:
    assert tree.memory() == MACHINE


def test_a_group_of_version_2_has_its_limit_less_what_it_cannot_take_back(tree: Tree) -> None:
    tree.mounted("0::/user.slice/prima.service", V2)
    tree.version_2("user.slice/prima.service", f"{4 * GB}", 3 * GB, (GB, GB // 2))
    assert tree.memory() == Memory(4 * GB, 2 * GB + GB // 2, 30, MemoryKind.GROUP)


def test_above_the_high_mark_a_group_is_slowed_down_so_it_counts_as_a_limit(tree: Tree) -> None:
    tree.mounted("0::/prima", V2)
    tree.version_2("prima", f"{4 * GB}", GB, high=f"{3 * GB}")
    assert tree.memory().available_bytes == 2 * GB
    tree.version_2("prima", "max", GB, high=f"{2 * GB}")
    assert tree.memory().total_bytes == 2 * GB


def test_a_group_of_version_1_counts_its_own_and_its_childrens_pages(tree: Tree) -> None:
    tree.mounted("4:memory:/docker/1f", V1)
    tree.version_1("docker/1f", 4 * GB, 3 * GB, (GB, GB // 2))
    assert tree.memory() == Memory(4 * GB, 2 * GB + GB // 2, 40, MemoryKind.GROUP)


def test_a_machine_that_lacks_its_reserve_counts_more_than_a_group_with_less_available(tree: Tree) -> None:
    tree.mounted("0::/prima", V2)
    tree.version_2("prima", f"{4 * GB}", 3 * GB)
    assert tree.memory().kind is MemoryKind.GROUP
    tree.file(tree.proc / "meminfo", MEMINFO.replace("9000000", "1200000"))  # of which 1.6 GB are for others
    assert tree.memory().kind is MemoryKind.MACHINE


def test_a_limit_around_the_group_holds_too(tree: Tree) -> None:
    tree.mounted("0::/outer/middle/inner", V2)
    tree.version_2("outer/middle/inner", f"{4 * GB}", GB)
    tree.version_2("outer/middle", "max", 2 * GB)
    tree.version_2("outer", f"{3 * GB}", 2 * GB)
    assert tree.memory().available_bytes == GB
    tree.version_2("outer/middle/inner", f"{4 * GB}", 4 * GB - 5)
    assert tree.memory().available_bytes == 5


@pytest.mark.parametrize("limit", [UNLIMITED, 17_000_000 * 1024], ids=["none", "more than there is"])
def test_a_limit_that_limits_nothing_is_none(tree: Tree, limit: int) -> None:
    tree.mounted("4:memory:/a", V1)
    tree.version_1("a", limit, GB)
    assert tree.memory() == MACHINE


def test_a_full_machine_counts_though_the_group_has_room(tree: Tree) -> None:
    tree.mounted("0::/a", V2)
    tree.version_2("a", f"{12 * GB}", 0)
    assert tree.memory() == MACHINE


def test_a_group_over_its_limit_has_nothing_left(tree: Tree) -> None:
    tree.mounted("0::/a", V2)
    tree.version_2("a", f"{GB}", 2 * GB)
    assert tree.memory().available_bytes == 0


def test_a_group_never_has_more_than_its_limit(tree: Tree) -> None:
    """Its pages are counted later than their sum."""
    tree.mounted("0::/a", V2)
    tree.version_2("a", f"{GB}", GB // 2, (GB, 0))
    assert tree.memory().available_bytes == GB


@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/1f", "/docker/1f"), ("/", "/"), ("/docker/1f", "/other"), ("/../1f", "/"), ("/", "/..")],
    ids=["the group is mounted", "own namespace", "a foreign group is mounted", "moved out of", "mounted from outside"],
)
def test_in_a_container_the_mount_is_the_group(tree: Tree, path: str, root: str) -> None:
    tree.mounted(f"0::{path}", V2, root)
    tree.version_2("", f"{GB}", 0)
    assert tree.memory().total_bytes == GB


def test_both_versions_at_once_both_count(tree: Tree) -> None:
    """As on machines in between: memory is a controller of version 1, the unified tree is there without it."""
    tree.mounted("4:memory:/a\n0::/b", V1)
    with (tree.proc / "self" / "mountinfo").open("a") as mounts:
        mounts.write(f"40 22 0:38 / {tree.proc.parent}/unified rw - cgroup2 cgroup2 rw\n")
    tree.version_1("a", 2 * GB, GB)
    (tree.proc.parent / "unified" / "b").mkdir(parents=True)
    assert tree.memory().total_bytes == 2 * GB


def test_a_group_that_tells_nothing_or_nonsense_is_no_limit(tree: Tree) -> None:
    tree.mounted("0::/a", V2)
    tree.version_2("a", "some", 1)
    assert tree.memory() == MACHINE
    shutil.rmtree(tree.fs)
    assert tree.memory() == MACHINE
    (tree.proc / "self" / "mountinfo").unlink()
    assert tree.memory() == MACHINE


def test_on_a_phone_the_systems_figure_counts(tree: Tree) -> None:
    tree.mounted("0::/uid_10123", V2)
    tree.version_2("uid_10123", f"{GB}", 0)
    memory = Linux(tree.proc, is_phone=True).memory()
    assert (memory.kind, memory.available_bytes) == (MemoryKind.PHONE, MACHINE.available_bytes)


def test_android_is_told_by_its_environment(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert Linux(tree.proc).memory().kind is MemoryKind.PHONE


# ---------------------------------------------------------------- pressure


def some(share: str) -> str:
    return f"some avg10={share} avg60=0.00 avg300=0.00 total=123\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=1\n"


def test_the_pressure_is_that_of_the_machine_or_the_group_whichever_is_higher(tree: Tree) -> None:
    system = Linux(tree.proc, is_phone=False)
    assert system.pressure() is None
    tree.file(tree.proc / "pressure" / "memory", some("1.50"))
    assert system.pressure() == pytest.approx(0.015)
    tree.mounted("0::/a/b", V2)
    tree.file(tree.fs / "a" / "memory.pressure", some("20.00"))
    assert system.pressure() == pytest.approx(0.2)


def test_a_kernel_that_counts_no_pressure_says_so_only_when_asked(tree: Tree) -> None:
    """With `psi=0` the file is there and cannot be read; here it is a folder."""
    (tree.proc / "pressure" / "memory").mkdir(parents=True)
    assert Linux(tree.proc, is_phone=False).pressure() is None


# ---------------------------------------------------------------- the real thing

HIERARCHY = Path("/sys/fs/cgroup/memory")
real = pytest.mark.skipif(
    not os.access(HIERARCHY / "memory.limit_in_bytes", os.W_OK) or os.geteuid() != 0,
    reason="needs root, and control groups of version 1 that may be made",
)

Group = Callable[[str, int], Path]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes groups with a limit; they go, innermost first, when the test is over."""
    made: list[Path] = []

    def make(path: str, limit: int) -> Path:
        folder = HIERARCHY / f"prima-test-{os.getpid()}{path}"
        folder.mkdir()
        made.append(folder)
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        return folder

    yield make
    for folder in reversed(made):
        folder.rmdir()


def run_in(folder: Path, program: str, *arguments: str) -> list[int]:
    """The numbers that a Python program prints which was in the group from its first instruction on."""
    enter = f'echo $$ > {folder}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", PRELUDE + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"
    return [int(word) for word in done.stdout.split()]


PRELUDE = """
import mmap, sys
import numpy as np
from prima_core.memory.cgroups import limiting_reads, slowing
from prima_core.memory.linux import Linux
system = Linux(is_phone=False)
def tell():
    memory = system.memory()
    print(memory.total_bytes, memory.available_bytes, memory.mapped_bytes)
def take(n_bytes):
    taken = np.ones(n_bytes // 4096 * 4096, np.uint8)
    return taken
"""
MB = 1 << 20


@real
def test_in_a_real_group_its_limit_and_what_is_taken_of_it_are_seen(group: Group) -> None:
    folder = group("", 256 * MB)
    total, before, _, _, after, _ = run_in(folder, "tell(); held = take(100 << 20); tell()")
    assert total == 256 * MB
    assert 180 * MB < before < 256 * MB
    assert before - after == pytest.approx(100 * MB, abs=8 * MB)


@real
def test_in_a_real_group_the_tighter_of_two_limits_counts(group: Group) -> None:
    group("", 128 * MB)
    total, *_ = run_in(group("/inner", 512 * MB), "tell()")
    assert total == 128 * MB


FILL = """
with open(sys.argv[1], "rb") as file:
    data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
for _ in range(3):
    data[::4096].max(), system.forget(data)  # used again and again: active
data[::4096].max()
tell()
held = take(system.memory().available_bytes - (16 << 20))
tell()
"""


@real
def test_in_a_real_group_the_pages_of_files_can_be_had_the_active_and_mapped_ones_too(
    group: Group, tmp_path: Path
) -> None:
    """All that is called available is taken at once: had it not been there the process would have been killed."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(120 * MB))
    with path.open("rb+") as file:  # what is charged to a group is what it has read itself
        os.fsync(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _, before, mapped, _, after, _ = run_in(group("", 256 * MB), FILL, str(path))
    assert mapped > 100 * MB
    assert before > 180 * MB
    assert after < 40 * MB


# ---------------------------------------------------------------- speed


def test_the_innermost_group_whose_reads_of_the_disk_are_limited_is_found(tree: Tree) -> None:
    tree.mounted("5:blkio:/outer/inner", "cgroup rw,blkio")
    tree.file(tree.fs / "outer" / "blkio.throttle.read_bps_device", "8:0 1000000\n")
    tree.file(tree.fs / "outer" / "inner" / "blkio.throttle.read_bps_device", "8:16 1000000\n")
    assert limiting_reads(tree.proc, "8:0") == tree.fs / "outer"
    assert limiting_reads(tree.proc, "8:16") == tree.fs / "outer" / "inner"
    assert limiting_reads(tree.proc, "8:32") is None


def test_in_version_2_a_limit_of_writes_is_none_of_reads(tree: Tree) -> None:
    tree.mounted("0::/prima", V2)
    tree.file(tree.fs / "prima" / "io.max", "8:0 rbps=max wbps=7 riops=max wiops=max\n8:16 rbps=5 wbps=max\n")
    assert limiting_reads(tree.proc, "8:0") is None
    assert limiting_reads(tree.proc, "8:16") == tree.fs / "prima"


def test_limits_of_speed_are_told_from_each_other(tree: Tree) -> None:
    tree.mounted("0::/prima", V2)
    assert list(slowing(tree.proc)) == []
    tree.file(tree.fs / "prima" / "cpu.max", "50000 100000\n")
    half = list(slowing(tree.proc))
    tree.file(tree.fs / "prima" / "cpu.max", "max 100000\n")
    assert half == ["cpu.max 50000 100000"] != list(slowing(tree.proc))
