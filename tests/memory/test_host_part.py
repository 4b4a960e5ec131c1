"""A device with a memory of its own: what it does not keep stays in the host's memory, as far as there is room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prima_core.interfaces import Layers, Slice, Store
from prima_core.memory import residency
from prima_core.memory.governor import Governor, HostPart
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import Memory
from prima_core.model.names import OUTPUT, TOKEN_EMBD
from prima_core.ring.loading import LoadingStore
from tests.memory.fakes import N_LAYERS, FakeSystem, assert_blocks, assert_layer, big_enough, ends_of, streaming

LAYER_BYTES = 4 * 65_536 + 3 * 81_920
ALL = N_LAYERS * LAYER_BYTES
HALF = ALL // 2
TENSOR = 81_920
MB = 10**6


def one_pass(store: Store) -> None:
    for layer in range(N_LAYERS):
        assert_layer(store, layer)


def passing(store: Store) -> list[str]:
    """What the device does not keep."""
    views = (weight for layer in range(N_LAYERS) for weight in store.views(layer).values())
    return [weight.name for weight in views if store.is_streamed(weight.name)]


@contextmanager
def beside(host_bytes: int, system: FakeSystem | None = None, streamed_bytes: int = HALF) -> Iterator[StreamingStore]:
    with streaming(streamed_bytes, 600_000, system, host_bytes=host_bytes) as store:
        yield store


def test_what_the_host_keeps_passes_on_the_device_but_is_not_read() -> None:
    system = FakeSystem()
    with beside(10 * MB, system) as store:
        with beside(0) as other:
            assert passing(store) == passing(other) != []
        for _ in range(3):
            one_pass(store)
        assert (system.reads, system.buffers, system.dropped) == ([], [], [])
        stats = store.stats()
        assert (stats.streamed_bytes, stats.buffer_bytes, stats.missed_bytes) == (0, 0, 0)
        assert HALF <= stats.pinned_bytes - store.device_bytes < HALF + TENSOR


def test_the_rest_is_read_and_no_more_is_kept_than_was_said() -> None:
    system = FakeSystem()
    with beside(HALF // 2, system) as store:
        for _ in range(3):
            one_pass(store)
        stats = store.stats()
        assert HALF // 2 - TENSOR < stats.pinned_bytes - store.device_bytes <= HALF // 2
        assert 3 * stats.streamed_bytes <= stats.read_bytes < 4 * stats.streamed_bytes + 600_000
        assert (stats.missed_bytes, stats.seeks) == (0, 0)
        kept = [name for name in passing(store) if store.stays(name)]
        assert 0 < len(kept) < len(passing(store))


def test_only_the_host_gives_way_and_takes_back() -> None:
    system = FakeSystem()
    with beside(10 * MB, system) as store:
        host, before = HostPart(store), passing(store)
        planned, on_device = host.pinned_bytes, store.device_bytes
        for wanted in (planned // 2, 0, planned // 3, planned):
            host.resize(wanted)
            one_pass(store)
            assert wanted - TENSOR < host.pinned_bytes <= wanted
            assert store.pinned_bytes == host.pinned_bytes + on_device
            assert passing(store) == before
        n_reads = len(system.reads)
        one_pass(store)
        assert len(system.reads) == n_reads
        host.resize(-MB)
        assert host.pinned_bytes == 0, "what the device keeps is not the host's to give"


def test_the_output_and_the_table_may_stay_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "BLOCK_BYTES", 64 * 512)
    model, system = big_enough(), FakeSystem()
    with streaming(10 * MB, 700_000, system, ends=ends_of(model), host_bytes=20 * MB) as store:
        host = HostPart(store)
        for wanted, table, output in ((20 * MB, True, True), (ALL, False, True), (200_000, False, False)):
            host.resize(wanted)
            one_pass(store)
            assert assert_blocks(store, OUTPUT, model) == [64] * 7 + [52]
            assert (store.stays(TOKEN_EMBD), store.stays(OUTPUT)) == (table, output)
            assert store.is_streamed(TOKEN_EMBD)
            assert store.is_streamed(OUTPUT)
        missed = []
        for _ in range(6):  # what was read ahead when that changed is short
            one_pass(store)
            assert_blocks(store, OUTPUT, model)
            missed.append(store.stats().missed_bytes)
        assert missed[-1] == missed[-2]


def test_ends_that_the_device_keeps_are_not_the_hosts() -> None:
    model = big_enough()
    with streaming(HALF, 700_000, ends=ends_of(model), host_bytes=0) as store:
        assert store.is_streamed(TOKEN_EMBD), "the table is the first to go"
        assert not store.is_streamed(OUTPUT)
        assert [weight.name for weight in store.pinned_ends()] == ["output_norm.weight", OUTPUT]
        HostPart(store).resize(0)
        assert store.stays(OUTPUT)


def test_what_the_host_keeps_is_read_while_the_model_is_loaded() -> None:
    model, system = big_enough(), FakeSystem()
    part = Slice((Layers(0, N_LAYERS),))
    sizes = HALF, 600_000
    store = StreamingStore(model.file, model.spec, part.layers, (), *sizes, system, 10 * MB)
    loading = LoadingStore(store, model.spec, [part], lambda done, total: None, system)
    for layer in range(N_LAYERS):
        loading.acquire(layer)
        loading.release(layer)
    store.close()
    assert sum(system.populated) == store.pinned_bytes >= ALL


def test_its_governor_sees_the_host_alone() -> None:
    """Whose other programs want all of it, and leave it again."""

    class Gauges:
        available_bytes = 100 * MB

        def memory(self) -> Memory:
            return Memory(200 * MB, self.available_bytes)

        def pressure(self) -> float | None:
            return None

    gauges, clock = Gauges(), iter(range(0, 10**6, 10))
    with beside(10 * MB, FakeSystem()) as store:
        for layer in range(N_LAYERS):  # what stays on the device has been copied there
            kept = [weight for weight in store.views(layer).values() if not store.is_streamed(weight.name)]
            store.give_back(kept)
        host = HostPart(store)
        planned = host.pinned_bytes
        governor = Governor(host, gauges, planned, lambda: float(next(clock)))
        for available, wanted in ((100 * MB, planned), (10 * MB, 0), (100 * MB, planned)):
            gauges.available_bytes = available
            for _ in range(4):
                governor.look()
            assert host.pinned_bytes == wanted
            one_pass(store)
