"""A node that is started again has the same id, and no two that run at a time have."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.node import identity
from prima_core.node.identity import own_id


def of(folder: Path, name: str = "desk") -> str:
    with own_id(folder, name) as id:
        return id


def test_a_node_has_the_same_id_at_every_start(tmp_path: Path) -> None:
    assert of(tmp_path) == of(tmp_path) != of(tmp_path, "kitchen")


def test_a_second_node_of_the_same_name_has_another_id_while_the_first_runs(tmp_path: Path) -> None:
    with own_id(tmp_path, "desk") as first:
        assert of(tmp_path) != first
    assert of(tmp_path) == first


def test_another_machine_with_a_copy_of_the_folder_has_another_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of(tmp_path)
    monkeypatch.setattr(identity, "machine_name", lambda: "another")
    assert of(tmp_path) != first


@pytest.mark.parametrize("damage", [b"", b"\xff" * 2000, b"short", b"-" * 16 + b" "])
def test_an_id_that_is_damaged_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    of(tmp_path)
    [path] = (tmp_path / "nodes").iterdir()
    path.write_bytes(damage)
    assert of(tmp_path) == of(tmp_path)
    assert len(of(tmp_path)) == 2 * identity.ID_BYTES


def test_where_nothing_can_be_written_every_start_has_its_own_id(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert of(tmp_path / "file") != of(tmp_path / "file")
