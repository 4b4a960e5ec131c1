"""What a store leaves in the page cache of a real file."""

from __future__ import annotations

import os
import shutil
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("Linux tells what is in its page cache", allow_module_level=True)

from prima_core.arch.families import open_model
from prima_core.memory import posix
from prima_core.memory.system import host
from tests.memory.fakes import N_LAYERS, assert_layer, big_enough, streaming


@pytest.fixture
def cold_copy(tmp_path: Path) -> Path:
    """A model of which nothing is in the page cache."""
    path = Path(shutil.copy(big_enough().path, tmp_path))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if host().resident_bytes(np.memmap(path, mode="r"), path):
        pytest.skip("the file system of the temporary folder keeps its files in memory")
    return path


def refuse(*_: object) -> int:
    raise OSError(22, "this file system has no direct reads")


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "buffered"])
def test_of_a_cold_file_nothing_that_is_streamed_is_in_the_page_cache_afterwards(
    cold_copy: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_direct:
        monkeypatch.setattr(posix, "read_at", refuse)
    system = host()
    with open_model(cold_copy) as model, streaming(N_LAYERS * 250_000, 1_000_000, system, model) as store:
        for weight in chain.from_iterable(store.views(layer).values() for layer in range(N_LAYERS)):
            system.forget(weight.data)
        whole = np.memmap(cold_copy, mode="r")
        system.drop(whole, cold_copy, 0)  # what was read with the header, marked to be read on from
        store.resize(store.pinned_bytes)  # what stays is there before a pass touches it
        for _ in range(3):
            for layer in range(N_LAYERS):
                assert_layer(store, layer)
        assert store.stats().missed_bytes == 0
        weights = [weight for layer in range(N_LAYERS) for weight in store.views(layer).values()]
        streamed = [weight.data[4096:-4096] for weight in weights if store.is_streamed(weight.name)]
        assert len(streamed) > N_LAYERS
        store.close()  # what is being read through the cache leaves it a moment later
        resident = sum(system.resident_bytes(data, cold_copy) or 0 for data in streamed)
        # Through the cache a run of pages that two readers had at once may stay.
        assert resident <= (0 if is_direct else sum(map(len, streamed)) // 4)
