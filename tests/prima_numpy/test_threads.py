"""How many threads compute where the user does not say."""

import os
from pathlib import Path

import pytest

from prima_numpy import threads
from prima_numpy.threads import cgroup_quota, default_threads, n_cores


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, os.cpu_count()),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, os.cpu_count()),
        ({}, os.cpu_count()),
    ],
)
def test_a_quota_counts_in_whole_cpus(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cgroup_quota(tmp_path) == cpus


def describe(root: Path, cores: list[list[int]]) -> None:
    """CPUs of each core, as Linux tells them."""
    for siblings in cores:
        for cpu in siblings:
            folder = root / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    describe(tmp_path, [[0, 4], [1, 5], [2], [3]])  # two fast cores and two slow ones
    assert [n_cores(cpus, tmp_path) for cpus in ({0}, {0, 4}, {0, 1, 4}, {0, 1, 2, 3, 4, 5})] == [1, 1, 2, 4]
    assert n_cores({0, 6}, tmp_path) == 0, "what the system does not describe is not guessed"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells the affinity of a process")
@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [
        ({0, 1, 2, 3}, "max 100000", 2),
        ({0, 2}, "max 100000", 1),
        ({1, 2}, "max 100000", 2),
        ({1, 2}, "100000 100000", 1),
    ],
)
def test_threads_default_to_the_cores_that_affinity_and_quota_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: str, expected: int
) -> None:
    describe(tmp_path, [[0, 2], [1, 3]])
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr(threads, "CPUS", tmp_path)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert default_threads() == expected
