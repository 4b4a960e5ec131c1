from __future__ import annotations

import errno
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prima_core.errors import ModelError, PlanError
from prima_core.interfaces import Layers
from prima_core.memory import reader, residency
from prima_core.memory.system import host
from tests.memory.fakes import N_LAYERS, FakeSystem, assert_layer, big_enough, ends_of, streaming

LAYER_BYTES = 4 * 65536 + 3 * 81920
HALF = N_LAYERS * LAYER_BYTES // 2


def one_pass(store, layers=range(N_LAYERS)) -> None:  # type: ignore[no-untyped-def]
    for layer in layers:
        assert_layer(store, layer, big_enough())


def test_with_nothing_streamed_there_is_no_thread_no_buffer_and_always_the_same_mapping() -> None:
    system = FakeSystem()
    with streaming(0, 0, system) as store:
        first = [store.acquire(layer) for layer in range(N_LAYERS)]
        for layer in range(N_LAYERS):
            store.release(layer)
            assert store.acquire(layer) is first[layer] is store.views(layer)
        assert not any(thread.name.startswith("prima-reader") for thread in threading.enumerate())
        assert (system.buffers, system.open_files, system.reads) == ([], 0, [])
        assert store.stats().buffer_bytes == 0


def test_passes_read_what_is_streamed_once_each_and_nothing_else() -> None:
    system = FakeSystem()
    with streaming(HALF, 400_000, system) as store:
        streamed = store.stats().streamed_bytes
        for _ in range(4):
            one_pass(store)
        assert HALF <= streamed < HALF + 65536
        stats = store.stats()
        assert (stats.seeks, stats.vain_bytes, stats.missed_bytes) == (0, 0, 0)
    ahead = 400_000
    n_units = 3 * N_LAYERS
    assert 4 * streamed <= store.stats().read_bytes <= 4 * (streamed + 1024 * n_units) + ahead
