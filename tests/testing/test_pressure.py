"""The hog takes what it is told, and a group keeps to its limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from prima_core.testing.pressure import ROOT, CachedFile, Hog, memory_group, why_no_groups

MB = 10**6

needs_groups = pytest.mark.skipif(bool(why_no_groups()), reason=why_no_groups())


def test_a_hog_holds_what_it_was_told_last() -> None:
    with Hog() as hog:
        assert hog.hold(40 << 20) == 40 << 20
        assert hog.hold(8 << 20) == 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a hog what is left")
def test_a_hog_stops_by_itself_where_a_machine_would_have_less_than_its_floor() -> None:
    with Hog(floor_bytes=psutil.virtual_memory().total) as hog:
        assert hog.hold(40 << 20) == 0


@needs_groups
def test_a_group_sees_what_a_hog_in_it_takes() -> None:
    with memory_group(200 * MB) as group, Hog(group) as hog:
        hog.hold(0)
        before = group.available_bytes
        hog.hold(64 << 20)
        assert 64 << 20 <= before - group.available_bytes < 70 << 20
        assert 64 << 20 <= group.peak_bytes <= 200 * MB
        assert group.n_killed == 0


@needs_groups
def test_a_hog_that_needs_more_than_the_limit_is_killed() -> None:
    with memory_group(60 * MB) as group, Hog(group) as hog:
        with pytest.raises(EOFError, match="ended with -9"):
            hog.hold(100 * MB)
        assert group.n_killed == 1


@needs_groups
def test_a_group_goes_with_its_processes() -> None:
    with memory_group(60 * MB) as group:
        process = group.popen(["sh", "-c", "echo started; exec sleep 1000"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
    process.communicate(timeout=10)
    assert process.returncode == -9
    assert list(ROOT.glob(group.folder.name)) == []


def test_of_a_file_that_was_read_all_is_cached_until_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "read"
    with CachedFile(path, 8 << 20) as file:
        assert file.cached_share() == 1.0
        if sys.platform == "linux":
            with path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 4 << 20, os.POSIX_FADV_DONTNEED)
        assert file.cached_share() == 0.5
        file.read()
        assert file.cached_share() == 1.0
    assert not path.exists()
