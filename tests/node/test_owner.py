"""The owner's other programs come first: a real node beside a program that takes memory, in a group with a limit."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prima_core.memory.governor import PROCESS_BYTES
from prima_core.testing.pressure import GROUP_IS_MACHINE, CachedFile, Hog, MemoryGroup, memory_group, why_no_groups
from prima_core.testing.served import Served
from prima_core.testing.tinymodel import TinyModel, big_shape

pytestmark = pytest.mark.skipif(bool(why_no_groups()), reason=why_no_groups())

MB = 10**6
DEADLINE_S = 30.0
SHAPE = TinyModel(n_layers=12, d_model=1024, n_heads=16, n_kv_heads=4, d_ff=4096, types="Q8_0", seed=3)
"""195 MB."""
OPTIONS = ("--threads", "1", "--parallel", "1", "-c", "256", "--log-level", "info")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_shape(tmp_path_factory.mktemp("owner") / "model.gguf", SHAPE)


@pytest.fixture(autouse=True)
def uncached(model: Path) -> None:
    """A page counts in the group of whoever read it first: here that has to be the node."""
    if sys.platform == "linux":
        with model.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answers_until(node: Served, right: str, is_so: Callable[[dict[str, float]], bool]) -> None:
    """Ask once, and again and again until the node's figures are as wanted; all answers are right."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert node.answer("owner", 4) == right
        if is_so(times := node.times()):
            return
        assert time.monotonic() < deadline, times


def taken_from(group: MemoryGroup, node: Served, share: float) -> int:
    """All that is left, and a share of what the node has pinned."""
    pinned = int(node.times()["pinned_bytes"])
    return group.available_bytes - pinned + int(pinned * share)


def test_a_node_shrinks_for_a_program_that_needs_memory_answers_rightly_and_grows_back(model: Path) -> None:
    with (
        memory_group(500 * MB) as group,
        Hog(group, bytes_s=400e6) as hog,
        Served([str(model), *OPTIONS], group) as node,
    ):
        right, planned = node.answer("owner", 4), node.times()["pinned_bytes"]
        assert planned > 190 * MB
        hog.aim(taken_from(group, node, 0.4))
        answers_until(node, right, lambda times: times["pinned_bytes"] <= 0.6 * planned)
        assert hog.reached()
        answers_until(node, right, lambda times: times["read_bytes"] > 2 * planned)
        hog.hold(0)
        answers_until(node, right, lambda times: times["pinned_bytes"] == planned)
        assert node.answer("owner", 4) == right
        assert group.n_killed == 0
        assert group.peak_bytes <= 500 * MB
        assert any("others need memory" in line for line in node.log)


def test_a_node_that_nobody_asks_shrinks_too(model: Path) -> None:
    with memory_group(500 * MB) as group, Hog(group) as hog, Served([str(model), *OPTIONS], group) as node:
        planned = node.times()["pinned_bytes"]
        hog.hold(taken_from(group, node, 0.4))
        until(lambda: node.times()["pinned_bytes"] <= 0.6 * planned)


def test_what_others_have_read_stays_cached_while_a_node_streams_shrinks_and_grows(model: Path, tmp_path: Path) -> None:
    """The group is the machine: a quarter of it is left to others, more than the file has."""
    with (
        memory_group(700 * MB) as group,
        CachedFile(tmp_path / "read", 100 * MB, group) as file,
        CachedFile(tmp_path / "elsewhere", 100 * MB) as elsewhere,
        Hog(group) as hog,
        Served([str(model), *OPTIONS], group, GROUP_IS_MACHINE) as node,
    ):
        right, planned = node.answer("owner", 4), node.times()["pinned_bytes"]
        for taken in range(30 * MB, 361 * MB, 30 * MB):  # no faster than a node that is held up can see
            hog.hold(taken)
            until(lambda: group.available_bytes - node.times()["pinned_bytes"] >= 175 * MB)
        answers_until(node, right, lambda times: times["read_bytes"] > 2 * planned)
        assert node.times()["pinned_bytes"] < planned
        hog.hold(0)
        answers_until(node, right, lambda times: times["pinned_bytes"] == planned)
        assert group.number("memory.failcnt") == 0, "the kernel had to take pages back"
        # Some kernels page out what is cold although nobody needs the room (DAMON).
        assert file.cached_share() > 0.99 or elsewhere.cached_share() < 0.99


def test_a_node_takes_no_more_than_its_cap_and_what_a_process_takes(model: Path) -> None:
    with memory_group(1000 * MB) as group, Served([str(model), *OPTIONS, "--memory", "140MB"], group) as node:
        node.answer("owner", 16)
        assert node.times()["streamed_bytes"] > 50 * MB
        assert group.peak_bytes <= 140 * MB + PROCESS_BYTES
        assert psutil.Process(node.process.pid).memory_info().rss <= 140 * MB + PROCESS_BYTES


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
