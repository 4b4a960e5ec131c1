"""A path becomes a model: checked, its weights by layer, its file watched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.interfaces import Slice, Store, Weight
from prima_core.memory.system import host
from prima_core.model.gguf import GGUFFile
from prima_core.model.weights import bytes_by_type, end_tensors, layer_names
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.model.gguf_builder import ARRAY, STRING, U8, Key, build, model_keys, model_tensors, small_model, with_key


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", TinyModel(types="Q8_0", n_layers=3))


def test_the_store_gives_every_tensor_once_and_without_a_copy(tiny: Path) -> None:
    with open_model(tiny) as model:
        store: Store = model.store()
        found = dict(store.shared())
        for layer in range(model.spec.n_layers):
            found |= {f"blk.{layer}.{name}": weight for name, weight in store.acquire(layer).items()}
            store.release(layer)
        assert found.keys() == model.file.tensors.keys()
        for name, weight in found.items():
            assert weight.name == name
            assert np.shares_memory(weight.data, model.file.view(name).data)


def test_acquiring_again_makes_no_new_views(tiny: Path) -> None:
    with open_model(tiny) as model:
        store = model.store()
        assert store.acquire(1) is store.acquire(1)


def layer_bytes(file: GGUFFile, layer: int) -> int:
    return sum(bytes_by_type(file, layer_names(file, layer)).values())


def test_layers_and_ends_are_all_tensors_each_once(tiny: Path) -> None:
    with open_model(tiny) as model:
        ends = end_tensors(model.spec, Slice((), has_input=True, has_output=True))
        names = [*ends, *(name for layer in range(3) for name in layer_names(model.file, layer))]
        assert sorted(names) == sorted(model.file.tensors)
        assert all(layer_bytes(model.file, layer) for layer in range(3))


def test_a_tied_output_part_holds_the_embeddings(tmp_path: Path) -> None:
    with open_model(write_tiny_model(tmp_path / "m.gguf", TinyModel(tied_output=True))) as model:
        assert end_tensors(model.spec, Slice((), has_output=True)) == ("output_norm.weight", "token_embd.weight")
        both = end_tensors(model.spec, Slice((), has_input=True, has_output=True))
        assert both == ("token_embd.weight", "output_norm.weight")


def test_a_vocabulary_alone_has_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build(model_keys()).data)
    with pytest.raises(ModelError, match="has no weights"):
        open_model(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (Key("general.type", STRING, "adapter"), "holds no model but: 'adapter'"),
        (Key("general.type", ARRAY, [1, 2], of=U8), "holds no model"),
    ],
)
def test_a_file_that_is_not_one_whole_model_is_refused(tmp_path: Path, key: Key, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build(with_key(model_keys(), key), model_tensors()).data)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(path)
    assert caught.value.field == key.name


def test_an_untouched_file_is_unchanged(tiny: Path) -> None:
    with open_model(tiny) as model:
        tiny.read_bytes()
        model.check_unchanged()


def test_a_file_written_to_is_noticed(tiny: Path) -> None:
    with open_model(tiny) as model:
        os.utime(tiny, ns=(0, model.file.parts[0].state.mtime_ns + 1_000_000_000))
        with pytest.raises(ModelError, match="was changed or replaced"):
            model.check_unchanged()


def test_a_replaced_file_is_noticed(tiny: Path, tmp_path: Path) -> None:
    with open_model(tiny) as model:
        (tmp_path / "new").write_bytes(tiny.read_bytes())
        os.utime(tmp_path / "new", ns=(0, model.file.parts[0].state.mtime_ns))
        os.replace(tmp_path / "new", tiny)
        with pytest.raises(ModelError, match="was changed or replaced"):
            model.check_unchanged()


def test_a_removed_file_is_noticed(tiny: Path) -> None:
    with open_model(tiny) as model:
        tiny.unlink()
        with pytest.raises(ModelError, match="went away"):
            model.check_unchanged()


def test_closing_twice_is_fine_and_views_stay_readable(tiny: Path) -> None:
    model = open_model(tiny)
    data = model.store().acquire(0)["attn_norm.weight"].data
    model.close()
    model.close()
    assert data.view(np.float32).mean() == pytest.approx(1, abs=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of a map is in memory")
def test_what_was_given_back_leaves_the_process_and_can_still_be_read(tmp_path: Path) -> None:
    model_file = TinyModel(n_layers=1, d_ff=4096, types="F32")
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", model_file)) as model:
        store = model.store()
        layer = store.acquire(0)
        for weight in layer.values():
            host().populate(weight.data)
        before, copies = resident_bytes(layer.values()), [weight.data.copy() for weight in layer.values()]
        store.give_back(layer.values())
        assert resident_bytes(layer.values()) < 0.05 * before
        assert all(np.array_equal(w.data, copy) for w, copy in zip(layer.values(), copies, strict=True))


def resident_bytes(weights: Iterable[Weight]) -> int:
    """Bytes of the maps that hold these weights which are in this process's memory, from /proc."""
    wanted = {weight.data.ctypes.data for weight in weights}
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(number, 16) for number in header.groups())
            inside = any(begin <= address < end for address in wanted)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_identity_of_a_model_does_not_tell_where_it_lies(tiny: Path) -> None:
    with open_model(tiny) as model:
        assert str(tiny.parent) not in repr(model.id)
        assert (model.id.size, model.id.name) == (tiny.stat().st_size, "tiny llama Q8_0")
        assert model.path == tiny


def test_a_small_hand_made_model_opens(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_model().data)
    with open_model(path) as model:
        assert model.spec.n_layers == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text_can_be_told_all_the_same(tmp_path: Path) -> None:
    with open_model(write_tiny_model(tmp_path / os.fsdecode(b"x\xff\x1b[2J.gguf"), TinyModel())) as model:
        assert model.name == "x??[2J"
