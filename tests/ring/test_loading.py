from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.interfaces import Layers, Slice
from prima_core.memory.system import host
from prima_core.ring import loading
from prima_core.ring.loading import LoadingStore
from prima_core.ring.serving import Holding, open_store
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.arch.small import small_model, small_spec
from tests.ring.fakes import FakeStore

MODEL = small_model(small_spec())
ENDS = Slice((Layers(1, 3),), has_input=True, has_output=True)


def store_of(
    part: Slice, tell: Callable[[int, int], None], ends: Sequence[str] = (), streamed: int = 0
) -> LoadingStore:
    store = FakeStore(MODEL, Holding(part.layers, tuple(ends), streamed, streamed))
    return LoadingStore(store, MODEL.spec, [part], tell, host())


def test_progress_grows_as_layers_are_bound_and_ends_at_all_bytes() -> None:
    told: list[tuple[int, int]] = []
    store = store_of(ENDS, lambda done, total: told.append((done, total)))
    store.shared()
    for layer in (1, 2, 1):  # once more: nothing is read again
        store.acquire(layer)
        store.release(layer)
    done, totals = [done for done, _ in told], {total for _, total in told}
    assert done == sorted(done)
    assert totals == {done[-1]}


def test_looking_at_views_reads_nothing() -> None:
    told: list[int] = []
    store = store_of(ENDS, lambda done, total: told.append(done))
    assert store.views(1).keys() == store.acquire(2).keys()
    n_told = len(told)
    store.views(1)
    assert len(told) == n_told


def test_layers_of_others_and_ends_of_others_are_not_read() -> None:
    told: list[int] = []
    store = store_of(Slice((Layers(1, 2),)), lambda done, total: told.append(done))
    store.shared()
    store.acquire(0)
    assert not told


def test_who_is_told_may_end_the_load() -> None:
    def refuse(done: int, total: int) -> None:
        raise InterruptedError

    store = store_of(ENDS, refuse)
    with pytest.raises(InterruptedError):
        store.acquire(1)


def test_progress_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    told: list[int] = []
    store = store_of(ENDS, lambda done, total: told.append(done))
    store.acquire(1)
    assert np.diff([0, *told]).max() == 1000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cuts no file that is mapped")
def test_a_file_that_was_cut_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(types="Q8_0", n_layers=3))
    with open_model(path) as model:
        opened = open_store(model, Holding(ENDS.layers, ("output_norm.weight",), 0, 0), host())
        store = LoadingStore(opened, model.spec, [ENDS], lambda done, total: None, host())
        os.truncate(path, 4096)
        with pytest.raises(ModelError, match="cannot be read"):
            store.shared()
        opened.close()


def test_what_is_kept_of_the_ends_is_read() -> None:
    told: list[int] = []
    store = store_of(ENDS, lambda done, total: told.append(total), ends=["output_norm.weight"])
    store.shared()
    assert told


def test_weights_that_are_streamed_are_not_read() -> None:
    told: list[int] = []
    store = store_of(ENDS, lambda done, total: told.append(done), streamed=1)
    store.shared()
    store.acquire(1)
    assert told == []
