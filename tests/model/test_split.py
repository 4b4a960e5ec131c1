"""A model in parts is the same model; parts that are missing, mixed up or of other models are named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.model import split
from prima_core.model.fingerprint import find_by_fingerprint
from prima_core.model.gguf import GGUFFile
from prima_core.model.part import Part
from prima_core.model.weights import bytes_by_type, layer_names
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.model.gguf_builder import (
    BOOL,
    I32,
    STRING,
    U16,
    Gguf,
    Key,
    build,
    model_keys,
    model_tensors,
    split_keys,
    split_model,
    with_key,
)
from tests.model.part_files import split_copy


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m.gguf", TinyModel(types="Q8_0", n_layers=3))


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    folder = tmp_path / "split"
    folder.mkdir()
    return split_copy(whole, folder, 12)


def written(folder: Path, built: list[Gguf], name: str = "m") -> list[Path]:
    paths = [folder / f"{name}-{number:05}-of-{len(built):05}.gguf" for number in range(1, len(built) + 1)]
    for path, part in zip(paths, built, strict=True):
        path.write_bytes(part.data)
    return paths


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return caught.value


# ---------------------------------------------------------------- whole


@pytest.mark.parametrize("index", [0, 1, 2])
def test_any_part_opens_the_whole_model(whole: Path, parts: list[Path], index: int) -> None:
    assert len(parts) == 3
    with open_model(whole) as one, open_model(parts[index]) as many:
        assert many.path == parts[0]
        assert many.spec == one.spec
        assert many.file.size == sum(path.stat().st_size for path in parts)
        assert many.file.tensors.keys() == one.file.tensors.keys()
        for name in one.file.tensors:
            assert np.array_equal(many.file.view(name).data, one.file.view(name).data)
            assert many.file.view(name).shape == one.file.view(name).shape


def test_sizes_for_planning_are_those_of_the_whole_file(whole: Path, parts: list[Path]) -> None:
    with open_model(whole) as one, open_model(parts[0]) as many:
        for layer in range(3):
            names = layer_names(one.file, layer)
            assert layer_names(many.file, layer) == names
            assert bytes_by_type(many.file, names) == bytes_by_type(one.file, names)
        assert bytes_by_type(many.file, many.file.tensors) == bytes_by_type(one.file, one.file.tensors)


def test_a_first_part_may_have_metadata_only(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    parts = split_copy(whole, tmp_path / "s", 16, first_has_none=True)
    with open_model(parts[-1]) as model:
        assert not model.file.parts[0].header.tensors
        assert model.spec.n_layers == 3


def test_the_name_of_a_split_model_has_no_part_number(whole: Path, parts: list[Path]) -> None:
    with open_model(parts[2]) as model:
        assert model.name == "m"
    with open_model(whole) as model:
        assert model.name == "m"


def test_a_name_that_only_looks_like_a_parts_is_a_whole_model(whole: Path) -> None:
    odd = whole.rename(whole.with_name("m-00003-of-00002.gguf"))
    with open_model(odd) as model:
        assert (model.name, model.path) == ("m-00003-of-00002", odd)
    assert split.all_parts(odd) == (odd,)
    lonely = odd.rename(whole.with_name("m-00001-of-00002.gguf"))
    with open_model(lonely) as model:
        assert len(model.file.parts) == 1


def test_a_count_of_one_is_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build([*model_keys(), *split_keys(0, 1, 11)], model_tensors()).data)
    with open_model(path) as model:
        assert model.file.path == path


# ---------------------------------------------------------------- identity


def test_a_split_model_is_found_again_wherever_it_lies_whatever_it_is_called(parts: list[Path], tmp_path: Path) -> None:
    with open_model(parts[0]) as model:
        wanted = model.id
    elsewhere = tmp_path / "models" / "maker"
    elsewhere.mkdir(parents=True)
    for path in parts:
        shutil.copy(path, elsewhere / path.name.replace("m-", "other-"))
    first = elsewhere / "other-00001-of-00003.gguf"
    assert find_by_fingerprint(wanted, [tmp_path / "models"]) == first
    assert find_by_fingerprint(wanted, [first]) == first
    last = elsewhere / "other-00003-of-00003.gguf"
    assert find_by_fingerprint(wanted, [last]) == last  # the user may name any
    last.unlink()
    assert find_by_fingerprint(wanted, [tmp_path / "models"]) is None


def test_parts_are_not_opened_as_models_of_their_own(
    parts: list[Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_model(parts[0]) as model:
        wanted = model.id
    opened: list[Path] = []
    really = GGUFFile.open

    def spied(path: Path) -> GGUFFile:
        opened.append(path)
        return really(path)

    monkeypatch.setattr(GGUFFile, "open", spied)
    assert find_by_fingerprint(wanted, [tmp_path]) == parts[0]
    assert opened == [parts[0]]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_change_in_any_part_is_another_model(parts: list[Path], index: int) -> None:
    with open_model(parts[0]) as model:
        before = model.fingerprint
        part = model.file.parts[index]
        tensor = next(iter(part.header.tensors.values()))
    data = bytearray(parts[index].read_bytes())
    data[tensor.offset + tensor.n_bytes // 2] ^= 1
    parts[index].write_bytes(data)
    with open_model(parts[0]) as model:
        assert model.fingerprint != before


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_part_written_to_or_removed_while_in_use_is_named(parts: list[Path], index: int) -> None:
    with open_model(parts[0]) as model:
        model.check_unchanged()
        os.utime(parts[index], ns=(0, 0))
        with pytest.raises(ModelError, match=f"{parts[index].name} was changed or replaced"):
            model.check_unchanged()
        parts[index].unlink()
        with pytest.raises(ModelError, match=f"{parts[index].name} went away"):
            model.check_unchanged()


# ---------------------------------------------------------------- not whole


def test_every_missing_part_is_named(parts: list[Path]) -> None:
    parts[0].unlink()
    parts[2].unlink()
    error = refusal(parts[1])
    assert error.field == "file"
    assert "2 of the 3 parts of the model are missing: m-00001-of-00003.gguf, m-00003-of-00003.gguf" in error.message


def test_of_very_many_missing_parts_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-60000.gguf"
    path.write_bytes(build(split_keys(1, 60000, 11)).data)
    first = "m-00001-of-60000.gguf, m-00003-of-60000.gguf, m-00004-of-60000.gguf"
    assert refusal(path).message.endswith(f"{first} and 59996 more")


def test_a_part_whose_name_tells_nothing_is_refused(parts: list[Path]) -> None:
    error = refusal(parts[1].rename(parts[1].with_name("renamed.gguf")))
    assert error.field == "split.count"
    assert "is one of 3 parts, which its name does not tell" in error.message
    assert "NAME-00001-of-00003.gguf" in error.hint


def test_a_name_that_tells_another_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00004.gguf"
    path.write_bytes(split_model(3)[0].data)
    assert refusal(path).message == "split.count: m-00001-of-00004.gguf says that there are 3 parts"


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    built = split_model(3)
    paths = written(tmp_path, [built[0], built[2], built[1]])
    for path in paths:
        error = refusal(path)
        assert error.field == "split.no"
        assert "is 2 in m-00002-of-00003.gguf, not 1" in error.message


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        (split_keys(1, 4, 11), "split.count"),
        (split_keys(1, 3, 12), "split.tensors.count"),
        (with_key(split_keys(1, 3, 11), Key("split.no", BOOL, 1)), "split.no"),
        (with_key(split_keys(1, 3, 11), Key("split.no", STRING, "1")), "split.no"),
        (with_key(split_keys(1, 3, 11), Key("split.tensors.count", I32, -1)), "split.tensors.count"),
        (split_keys(1, 3, 11)[1:], "split.no"),
        ([], "split.no"),
        ([*split_keys(1, 3, 11), Key("general.architecture", STRING, "qwen2")], "general.architecture"),
        ([*split_keys(1, 3, 11), Key("general.architecture", U16, 1)], "general.architecture"),
    ],
)
def test_a_part_of_another_model_is_refused(tmp_path: Path, keys: list[Key], field: str) -> None:
    built = split_model(3)
    built[1] = build(keys, model_tensors()[4:8])
    for path in written(tmp_path, built):
        if path.name.startswith("m-00002") and field == "split.no" and not keys:
            continue  # by itself it is no part at all
        error = refusal(path)
        assert error.field == field
        assert "m-00002-of-00003.gguf" in error.message or field == "split.count"


def test_a_part_may_repeat_the_architecture(tmp_path: Path) -> None:
    built = split_model(3)
    built[1] = build([*split_keys(1, 3, 11), Key("general.architecture", STRING, "llama")], model_tensors()[4:8])
    with open_model(written(tmp_path, built)[1]) as model:
        assert model.spec.arch == "llama"


def test_a_tensor_in_two_parts_is_named_with_both(tmp_path: Path) -> None:
    built = split_model(3)
    built[1] = build(split_keys(1, 3, 11), model_tensors()[3:8])
    error = refusal(written(tmp_path, built)[0])
    assert error.field == "blk.0.attn_k.weight"
    assert "is in m-00001-of-00003.gguf and in m-00002-of-00003.gguf" in error.message


def test_a_tensor_in_no_part_is_noticed(tmp_path: Path) -> None:
    built = split_model(3)
    built[1] = build(split_keys(1, 3, 11), model_tensors()[5:8])
    error = refusal(written(tmp_path, built)[0])
    assert (error.field, error.message) == (
        "split.tensors.count",
        "split.tensors.count: says 11, the parts have 10 together",
    )


def test_damage_in_another_part_than_the_named_one_tells_which(tmp_path: Path) -> None:
    built = split_model(3)
    paths = written(tmp_path, built)
    paths[2].write_bytes(built[2].data[:-1])
    error = refusal(paths[0])
    assert error.field == "output_norm.weight"
    assert error.message.endswith("(in m-00003-of-00003.gguf)")
    paths[2].write_bytes(b"")
    assert "m-00003-of-00003.gguf is empty" in refusal(paths[0]).message


def test_what_is_no_part_of_the_model_is_noticed_before_more_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to one large header, a thousand of them, would take the memory of a thousand."""
    first, *others = written(tmp_path, split_model(5))
    for path in others:
        shutil.copy(first, path)
    opened: list[Path] = []

    def open_part(path: Path) -> Part:
        opened.append(path)
        return Part.open(path)

    monkeypatch.setattr(split, "open_part", open_part)
    assert refusal(first).field == "split.no"
    assert opened == others[:1]
