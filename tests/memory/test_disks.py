"""Names of machines and disks: equal where the thing is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.memory import disks
from prima_core.memory.disks import disk_name, machine_name


def test_files_on_one_disk_have_one_name(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.touch()
    names = {disk_name(file) for file in files}
    assert len(names) == 1
    assert names.pop().startswith(machine_name())


def test_a_group_with_a_limit_of_its_own_has_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "whole_disk", lambda path: "8:0")
    monkeypatch.setattr(disks, "limiting_reads", lambda proc, disk: None)
    shared = disk_name(tmp_path)
    monkeypatch.setattr(disks, "limiting_reads", lambda proc, disk: Path("/groups/a"))
    assert disk_name(tmp_path) == f"{shared} a"


def test_a_machine_that_does_not_tell_its_start_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_PROC", tmp_path)
    monkeypatch.setattr("platform.node", lambda: "desk")
    assert machine_name() == "desk"
