"""What stays in memory shrinks and grows while the store is in use; the weights are right all the time."""

from __future__ import annotations

import threading

import pytest

from prima_core.errors import ModelError
from prima_core.interfaces import Store
from prima_core.memory import inventory, residency
from tests.memory.fakes import N_LAYERS, FakeSystem, assert_blocks, assert_layer, big_enough, ends_of, streaming

LAYER_BYTES = 4 * 65_536 + 3 * 81_920
ALL = N_LAYERS * LAYER_BYTES
NORMS = N_LAYERS * 2 * 512
LAYER_TENSORS = 9


def one_pass(store: Store) -> None:
    for layer in range(N_LAYERS):
        assert_layer(store, layer)


def n_readers() -> int:
    return sum(thread.name.startswith("prima-reader") for thread in threading.enumerate())


def streamed_of(store: Store) -> list[int]:
    """By layer, in bytes, as last acquired."""
    return [
        sum(len(weight.data) for weight in store.views(layer).values() if store.is_streamed(weight.name))
        for layer in range(N_LAYERS)
    ]


def test_what_is_given_up_is_dropped_at_once_and_read_from_the_next_round_on() -> None:
    system = FakeSystem()
    with streaming(0, 0, system) as store:
        one_pass(store)
        store.resize(ALL // 2)
        stats = store.stats()
        assert sum(n_bytes for _, n_bytes in system.dropped) == stats.streamed_bytes
        assert n_readers() == 0  # nobody computes
        for _ in range(3):
            one_pass(store)
        assert n_readers() == 4
        assert store.stats().missed_bytes == 0
        assert ALL // 2 - 81_920 < stats.pinned_bytes + store.stats().buffer_bytes <= ALL // 2
        assert sum(streamed_of(store)) == stats.streamed_bytes
        assert max(streamed_of(store)) - min(streamed_of(store)) <= 2 * 81_920


def test_what_is_taken_back_is_read_once_and_the_readers_go_with_the_last_of_it() -> None:
    system = FakeSystem()
    with streaming(ALL, 1_000_000, system) as store:
        first = [store.views(layer) for layer in range(N_LAYERS)]
        one_pass(store)
        for pinned in (ALL // 3, ALL // 2, ALL + NORMS):
            store.resize(pinned)
            assert pinned - 81_920 <= store.pinned_bytes <= pinned
            one_pass(store)
        assert (n_readers(), store.stats().buffer_bytes, store.stats().streamed_bytes) == (0, 0, 0)
        assert [store.acquire(layer) for layer in range(N_LAYERS)] == first
        for layer in range(N_LAYERS):
            store.release(layer)
        n_reads = len(system.reads)
        one_pass(store)
        assert len(system.reads) == n_reads


def test_resizing_up_and_down_keeps_to_the_bytes_that_are_asked_for() -> None:
    with streaming(ALL // 2, 1_000_000) as store:
        for pinned in (0, ALL, 100_000, ALL // 2, 10 * ALL, 3 * LAYER_BYTES, 3 * LAYER_BYTES, 0):
            store.resize(pinned)
            assert store.pinned_bytes <= max(pinned, NORMS)
            assert store.pinned_bytes >= min(pinned, ALL) - 81_920
            one_pass(store)
        assert store.pinned_bytes == NORMS


def test_pages_that_the_system_took_come_back() -> None:
    system = FakeSystem(resident=0.25)
    with streaming(0, 0, system) as store:
        assert store.lost_bytes() == (ALL + NORMS) * 3 // 4
        store.resize(ALL // 2)
        assert sum(system.populated) == store.pinned_bytes
        system.resident = None
        assert store.lost_bytes() is None


def test_what_a_device_copied_is_neither_missed_nor_brought_back() -> None:
    system = FakeSystem(resident=0.0)
    with streaming(0, 0, system) as store:
        for layer in range(N_LAYERS):
            store.give_back(store.views(layer).values())
        assert system.forgotten == ALL + NORMS
        assert store.lost_bytes() == 0
        assert store.copied_bytes == store.pinned_bytes == ALL + NORMS
        store.resize(ALL // 2)
        assert store.copied_bytes == store.pinned_bytes
        store.resize(ALL + NORMS)
        assert not system.populated


def test_a_layer_in_use_stays_as_it_was_given_until_it_is_released() -> None:
    system = FakeSystem()
    with streaming(0, 0, system) as store:
        given = store.acquire(2)
        store.resize(0)
        assert store.acquire(2) is given
        assert not any(store.is_streamed(weight.name) for weight in given.values())
        store.release(2)
        system.dropped.clear()
        store.release(2)
        assert sum(n_bytes for _, n_bytes in system.dropped) == LAYER_BYTES  # what came back meanwhile
        assert_layer(store, 2)
        assert all(store.is_streamed(name) for name in ("blk.2.attn_q.weight", "blk.2.ffn_up.weight"))


def test_what_is_taken_back_while_it_waits_in_the_buffer_is_given_from_the_map() -> None:
    with streaming(ALL, 1_000_000) as store:
        assert_layer(store, 0)
        store.resize(ALL + NORMS)
        given = store.acquire(1)
        assert given is store.views(1)
        assert not any(store.is_streamed(weight.name) for weight in given.values())
        store.release(1)


def test_a_buffer_that_suffices_is_kept_and_one_that_does_not_grows_at_the_cost_of_what_stays() -> None:
    system = FakeSystem()
    with streaming(ALL // 6, 250_000, system) as store:
        one_pass(store)
        for pinned in (2_400_000, 1_500_000, 1_000_000, 200_000):
            before = store.stats()
            store.resize(pinned)
            one_pass(store)
            stats = store.stats()
            grown_bytes = stats.buffer_bytes - before.buffer_bytes
            assert pinned - 81_920 < stats.pinned_bytes + grown_bytes <= pinned
            assert system.buffers[-1] == stats.buffer_bytes
            missed_bytes = stats.missed_bytes
            one_pass(store)
            assert store.stats().missed_bytes == missed_bytes
        assert system.buffers[0] == 250_000 < system.buffers[1]
        assert LAYER_BYTES + 81_920 <= stats.buffer_bytes < LAYER_BYTES + 81_920 + 16 * 4096


def test_a_buffer_is_as_planned_again_once_that_suffices() -> None:
    system = FakeSystem()
    with streaming(ALL // 6, 250_000, system) as store:
        planned = store.pinned_bytes
        for pinned in (0, planned):
            store.resize(pinned)
            one_pass(store)
        assert store.pinned_bytes == planned
        assert (system.buffers[0], *system.buffers[2:]) == (250_000, 250_000)


def test_what_a_buffer_has_grown_by_is_not_counted_again_though_nobody_computes() -> None:
    with streaming(0, 0) as store:
        for pinned in (ALL // 2, ALL // 2, ALL // 2):
            store.resize(pinned)
        one_pass(store)
        assert store.pinned_bytes > ALL // 2 - 81_920


def test_the_output_and_the_table_are_given_up_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "BLOCK_BYTES", 64 * 512)
    model, system = big_enough(), FakeSystem()
    with streaming(0, 0, system, ends=ends_of(model)) as store:
        for pinned, n_blocks, is_left_out in (
            (10**9, 1, False),
            (ALL + 300_000, 1, True),
            (200_000, 8, True),
            (0, 8, True),
        ):
            store.resize(pinned)
            one_pass(store)
            assert len(assert_blocks(store, "output.weight", model)) == n_blocks
            assert store.is_streamed("token_embd.weight") == is_left_out
        system.populated.clear()
        store.resize(10**9)
        assert sum(system.populated) == store.pinned_bytes == ALL + NORMS + 2 * 500 * 512 + 512
        assert len(assert_blocks(store, "output.weight", model)) == 1


def test_a_disk_that_fails_is_told_and_what_was_not_read_is_streamed_on() -> None:
    system = FakeSystem()
    with streaming(ALL, 1_000_000, system) as store:
        system.is_disk_broken = True
        with pytest.raises(ModelError, match=r"\.gguf cannot be read: Input/output error"):
            store.resize(ALL)
        assert store.pinned_bytes == NORMS
        one_pass(store)
        system.is_disk_broken = False
        store.resize(ALL + NORMS)
        assert store.pinned_bytes == ALL + NORMS


def test_a_closed_store_is_not_resized() -> None:
    system = FakeSystem()
    with streaming(ALL, 1_000_000, system) as store:
        store.close()
        store.resize(ALL)
        assert not system.populated


def test_resizing_ends_when_the_store_is_closed_meanwhile() -> None:
    class Closing(FakeSystem):
        def populate(self, data) -> None:  # type: ignore[no-untyped-def]
            super().populate(data)
            if len(self.populated) == 3:
                closing.start()
                is_closing.wait(30)

    def close() -> None:
        store._inventory._is_closed = True
        is_closing.set()

    is_closing, closing, system = threading.Event(), threading.Thread(target=close), Closing()
    with streaming(ALL, 1_000_000, system) as store:
        store.resize(ALL)
        closing.join()
        assert len(system.populated) == 3


def test_closing_does_not_wait_for_what_is_taken_back_from_a_disk_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "JOIN_S", 0.01)
    is_open, is_reached = threading.Event(), threading.Event()

    class Hanging(FakeSystem):
        def populate(self, data) -> None:  # type: ignore[no-untyped-def]
            super().populate(data)
            if len(self.populated) == LAYER_TENSORS:  # the last one of a layer
                is_reached.set()
                assert is_open.wait(30)

    def resize() -> None:
        store.resize(ALL + NORMS)
        resized.append(True)

    resized: list[bool] = []
    system = Hanging()
    with streaming(ALL, 1_000_000, system) as store:
        resizing = threading.Thread(target=resize)
        resizing.start()
        assert is_reached.wait(30)
        store.close()
        assert resizing.is_alive()
        is_open.set()
        resizing.join()
    assert (resized, len(system.populated)) == ([True], LAYER_TENSORS)


def test_another_thread_may_resize_while_layers_are_acquired() -> None:
    is_over = threading.Event()

    def resize() -> None:
        pinned = 0
        while not is_over.is_set():
            pinned = (pinned + 777_777) % (ALL + 500_000)
            store.resize(pinned)

    resizing = threading.Thread(target=resize)
    with streaming(ALL // 2, 1_000_000) as store:
        resizing.start()
        try:
            for _ in range(40):
                one_pass(store)
        finally:
            is_over.set()
            resizing.join()
