"""A valid file is read as it is written; one that is no GGUF file is told what it is."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter

from prima_core.errors import ModelError
from prima_core.model.gguf import GGUFFile, StringArray
from prima_core.model.quant import GGUFType
from tests.model.gguf_builder import ARRAY, BOOL, STRING, T_Q8_0, T_TQ1_0, U32, Key, Tensor, build, small_model


def write(path: Path, data: bytes | bytearray) -> Path:
    path.write_bytes(data)
    return path


def written_by_gguf(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("x.u8", 200)
    writer.add_int8("x.i8", -3)
    writer.add_uint16("x.u16", 60000)
    writer.add_int16("x.i16", -300)
    writer.add_uint32("x.u32", 4_000_000_000)
    writer.add_int32("x.i32", -5)
    writer.add_uint64("x.u64", 1 << 63)
    writer.add_int64("x.i64", -(1 << 62))
    writer.add_float32("x.f32", 0.1)
    writer.add_float64("x.f64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.text", "gr\u00fc\u00dfe \U0001f600")
    writer.add_array("x.strings", ["a", "\u00e9", "long" * 50])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.bools", [True, False])
    writer.add_tensor("matrix", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("half", np.arange(6, dtype=np.float16).reshape(1, 2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equal_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = written_by_gguf(tmp_path / "m.gguf")
    theirs = {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    with GGUFFile.open(path) as file:
        ours = {
            name: list(value) if isinstance(value, StringArray | np.ndarray) else value
            for name, value in file.metadata.items()
        }
    assert ours == theirs
    assert type(ours["x.bool"]) is bool
    assert type(ours["x.u64"]) is int


def test_tensors_equal_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = written_by_gguf(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        for theirs in GGUFReader(path).tensors:
            info, weight = file.tensors[theirs.name], file.view(theirs.name)
            assert info.shape == weight.shape == tuple(reversed(theirs.shape.tolist()))
            assert weight.type is GGUFType(theirs.tensor_type)
            assert (info.offset, info.n_bytes) == (theirs.data_offset, theirs.n_bytes)
            assert weight.data.tobytes() == theirs.data.tobytes()
        assert len(file.tensors) == 2


def test_bytes_that_are_no_utf8_survive_as_surrogates(tmp_path: Path) -> None:
    tokens = [b"\xc3", b"\xff\x00", "\u00e9".encode(), b""]
    path = write(tmp_path / "m.gguf", build([Key("t", ARRAY, tokens)]).data)
    with GGUFFile.open(path) as file:
        strings = file.metadata["t"]
    assert isinstance(strings, StringArray)
    assert [text.encode("utf-8", "surrogateescape") for text in strings] == tokens


def test_string_arrays_behave_as_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", build([Key("t", ARRAY, ["a", "b", "c"])]).data)
    strings = GGUFFile.open(path).metadata["t"]
    assert isinstance(strings, StringArray)
    assert len(strings) == 3
    assert strings[1] == "b"
    assert strings[-1] == "c"
    assert strings[:2] == ["a", "b"]
    assert "c" in strings


def test_a_large_vocabulary_stays_in_the_file_until_it_is_read(tmp_path: Path) -> None:
    tokens = [f"token {i}" for i in range(150_000)]
    path = write(tmp_path / "m.gguf", build([Key("tokens", ARRAY, tokens), Key("merges", ARRAY, tokens)]).data)
    tracemalloc.start()
    try:
        file = GGUFFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert list(file.metadata["merges"]) == tokens  # type: ignore[arg-type]  # it is an array


def test_a_view_is_read_only_and_no_copy(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "m.gguf", small_model().data)) as file:
        first, second = file.view("output_norm.weight").data, file.view("output_norm.weight").data
        assert np.shares_memory(first, second)
        with pytest.raises(ValueError, match="read-only"):
            first[0] = 1


def test_a_view_outlives_the_file(tmp_path: Path) -> None:
    built = small_model()
    with GGUFFile.open(write(tmp_path / "m.gguf", built.data)) as file:
        data = file.view("output_norm.weight").data
    assert data.tobytes() == bytes(built.data[-len(data) :])
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.view("output_norm.weight")


def test_an_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    keys = [Key("general.alignment", U32, 128)]
    tensors = [Tensor("a", (3,)), Tensor("b", (5,))]
    with GGUFFile.open(write(tmp_path / "m.gguf", build(keys, tensors, alignment=128).data)) as file:
        assert file.tensors["a"].offset % 128 == 0
        assert file.tensors["b"].offset == file.tensors["a"].offset + 128


def test_a_tensor_of_an_unknown_type_spoils_only_its_own_view(tmp_path: Path) -> None:
    tensors = [Tensor("new", (256,), T_TQ1_0), Tensor("odd", (256,), 77), Tensor("good", (32,), T_Q8_0)]
    with GGUFFile.open(write(tmp_path / "m.gguf", build([Key("general.name", STRING, "x")], tensors).data)) as file:
        assert file.metadata["general.name"] == "x"
        assert len(file.view("good").data) == 34
        with pytest.raises(ModelError, match=r"^new: tensor type TQ1_0 is not supported"):
            file.view("new")
        with pytest.raises(ModelError, match=r"^odd: tensor type number 77"):
            file.view("odd")


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    with (
        GGUFFile.open(write(tmp_path / "m.gguf", small_model().data)) as file,
        pytest.raises(ModelError, match=r"^output\.weight: there is no such tensor"),
    ):
        file.view("output.weight")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04 archive", "zip archive"),
        (b"\x80\x02pickle", "pickle"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__":{}}', "safetensors"),
        (b"tjgg\x03\0\0\0", "from before GGUF"),
        (b'{"a": 1}', "JSON"),
        (b"hello world", "not a GGUF file: it begins with b'hell'"),
        (b"", "is empty"),
    ],
)
def test_another_kind_of_file_is_recognised(tmp_path: Path, start: bytes, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        GGUFFile.open(write(tmp_path / "m.gguf", start))
    assert caught.value.field == "magic"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "version 1 is not supported"),
        (4, "version 4"),
        (3 << 24, "big-endian, made for machines like IBM Z"),
        (0, "version 0"),
    ],
)
def test_another_version_is_refused(tmp_path: Path, version: int, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        GGUFFile.open(write(tmp_path / "m.gguf", build(version=version).data))
    assert caught.value.field == "version"


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        GGUFFile.open(tmp_path)


def test_a_missing_file_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        GGUFFile.open(tmp_path / "absent.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in Windows' file system")
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    if sys.platform != "win32":  # always so here; mypy reads no marks
        os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe")


def test_a_forbidden_file_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prima_core.model.part.open", refuse, raising=False)
    with pytest.raises(ModelError, match="may not be read"):
        GGUFFile.open(write(tmp_path / "m.gguf", small_model().data))


def test_truth_values_are_bools(tmp_path: Path) -> None:
    keys = [Key("yes", BOOL, 1), Key("many", ARRAY, [0, 1], of=BOOL)]
    metadata = GGUFFile.open(write(tmp_path / "m.gguf", build(keys).data)).metadata
    assert metadata["yes"] is True
    many = metadata["many"]
    assert isinstance(many, np.ndarray)
    assert many.dtype == np.bool_


def test_version_2_is_read_as_version_3(tmp_path: Path) -> None:
    old, new = (write(tmp_path / f"{v}.gguf", small_model(version=v).data) for v in (2, 3))
    with GGUFFile.open(old) as two, GGUFFile.open(new) as three:
        assert two.tensors == three.tensors
        assert list(two.metadata) == list(three.metadata)
        assert two.view("output_norm.weight").data.tobytes() == three.view("output_norm.weight").data.tobytes()


def test_a_big_endian_file_of_the_gguf_package_is_told_what_it_is(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "big.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="the file is big-endian") as caught:
        GGUFFile.open(tmp_path / "big.gguf")
    assert caught.value.field == "version"
    assert "gguf-convert-endian" in caught.value.hint
