"""The same model is known again wherever it lies, and no other model is taken for it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.memory.system import host
from prima_core.model.fingerprint import ModelId, find_by_fingerprint, fingerprint
from prima_core.model.gguf import GGUFFile
from prima_core.testing.tinymodel import TinyModel, big_shape
from tests.model.gguf_builder import STRING, Key, build, model_keys, model_tensors, small_model, with_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_model().data)
    return path


def identity(path: Path) -> ModelId:
    with open_model(path) as model:
        return model.id


def fingerprint_of(path: Path) -> str:
    with GGUFFile.open(path) as file:
        return fingerprint(file)


def test_a_copy_under_another_name_is_the_same_model(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path / "other.gguf"))
    assert fingerprint_of(copy) == fingerprint_of(path)
    assert len(fingerprint_of(path)) == 64


def test_a_fingerprint_reads_little_of_the_file(tmp_path: Path) -> None:
    """Systems read some MiB around a page that is touched, and so all of a model into other programs' memory."""
    path = big_shape(tmp_path / "m.gguf", TinyModel(n_layers=4, d_model=512, d_ff=4096, types="F32"))
    if sys.platform == "linux":
        with path.open("rb+") as written:
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with GGUFFile.open(path) as file:
        fingerprint(file)
        cached = [host().resident_bytes(file.view(name).data, path) for name in file.tensors]
        assert None not in cached, "this system does not tell"
        assert sum(filter(None, cached)) < file.size / 4


def test_another_header_is_another_model(path: Path) -> None:
    before = fingerprint_of(path)
    path.write_bytes(build(with_key(model_keys(), Key("general.name", STRING, "SMALL")), model_tensors()).data)
    assert fingerprint_of(path) != before


def test_a_change_in_any_one_tensor_is_another_model(path: Path) -> None:
    before, data = fingerprint_of(path), path.read_bytes()
    with GGUFFile.open(path) as file:
        middles = [info.offset + info.n_bytes // 2 for info in file.tensors.values()]
    for middle in middles:
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        assert fingerprint_of(path) != before


def test_a_longer_file_is_another_model(path: Path) -> None:
    before = fingerprint_of(path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint_of(path) != before


def test_a_model_is_found_in_a_folder_below(path: Path, tmp_path: Path) -> None:
    wanted = identity(path)
    hidden = tmp_path / "models" / "maker" / "renamed.gguf"
    hidden.parent.mkdir(parents=True)
    shutil.move(path, hidden)
    assert find_by_fingerprint(wanted, [tmp_path / "absent", tmp_path / "models"]) == hidden


def test_a_model_is_found_by_its_own_path(path: Path) -> None:
    assert find_by_fingerprint(identity(path), [path]) == path


def test_damaged_and_foreign_files_of_the_same_size_are_passed_over(path: Path, tmp_path: Path) -> None:
    wanted, size = identity(path), path.stat().st_size
    (tmp_path / "a.gguf").write_bytes(bytes(size))
    (tmp_path / "b.gguf").write_bytes(path.read_bytes()[:-1] + b"\xff")
    (tmp_path / "c.gguf").mkdir()
    assert find_by_fingerprint(wanted, [tmp_path]) == path


def test_no_file_of_the_model_is_none(path: Path) -> None:
    wanted = identity(path)
    assert find_by_fingerprint(replace(wanted, fingerprint="0" * 64), [path.parent]) is None
    assert find_by_fingerprint(replace(wanted, size=1), [path.parent]) is None
