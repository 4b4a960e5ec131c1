"""The weights that a store gives are those of the file, in any order, and what it reads is what it has to."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prima_core.errors import PlanError
from prima_core.interfaces import Layers, Store
from prima_core.memory import reader, residency
from tests.memory.fakes import N_LAYERS, FakeSystem, assert_blocks, assert_layer, big_enough, ends_of, streaming

LAYER_BYTES = 4 * 65_536 + 3 * 81_920
ALL = N_LAYERS * LAYER_BYTES
HALF = ALL // 2


def one_pass(store: Store, layers: Iterable[int] = range(N_LAYERS)) -> None:
    for layer in layers:
        assert_layer(store, layer)


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
    with streaming(HALF, 600_000, system) as store:
        for _ in range(4):
            one_pass(store)
        stats = store.stats()
        assert (stats.seeks, stats.vain_bytes, stats.missed_bytes) == (0, 0, 0)
        assert HALF <= stats.streamed_bytes < HALF + 65_536
        assert stats.pinned_bytes + stats.streamed_bytes == ALL + N_LAYERS * 2 * 512
    in_a_pass = {offset for offset, _ in system.reads}
    n_bytes = sum(dict(system.reads).values())
    assert n_bytes < stats.streamed_bytes + len(in_a_pass) * 1024  # each is read with the blocks that it lies in
    assert 4 * n_bytes <= store.stats().read_bytes <= 4 * n_bytes + 600_000


def test_reading_goes_on_while_nothing_is_asked_for() -> None:
    are_read = threading.Event()
    system = FakeSystem(lambda offset: are_read.set() if len(system.reads) == 12 else None)
    with streaming(HALF, 2_000_000, system) as store:
        assert are_read.wait(30)
        one_pass(store)


def test_what_stays_lies_in_the_map_and_what_is_streamed_does_not() -> None:
    with streaming(HALF) as store:
        given, whole = store.acquire(0), store.views(0)
        for name, weight in given.items():
            is_in_map = weight.data.ctypes.data == whole[name].data.ctypes.data
            assert is_in_map != store.is_streamed(weight.name)
        assert {store.is_streamed(weight.name) for weight in given.values()} == {True, False}
        again = store.acquire(0)
        assert again is given
        store.release(0)
        store.release(0)
        assert store.acquire(0) is not given
        store.release(0)


def test_views_lie_in_memory_as_they_lie_in_the_file() -> None:
    """Kernels may rely on the alignment of tensors in a file."""
    with streaming(ALL) as store:
        for name, weight in store.acquire(3).items():
            assert weight.data.ctypes.data % 512 == store.views(3)[name].data.ctypes.data % 512
        store.release(3)


def test_layers_of_another_device_are_views_into_the_map() -> None:
    with streaming(3 * LAYER_BYTES, model=big_enough(), visits=[Layers(4, 6), Layers(1, 2)]) as store:
        assert store.acquire(3) is store.views(3)
        one_pass(store, (4, 5, 3, 1, 0, 2))
        assert store.stats().seeks == 0


def test_visits_are_read_in_their_order() -> None:
    system = FakeSystem()
    with streaming(4 * LAYER_BYTES, 600_000, system, visits=[Layers(4, 6), Layers(0, 2)]) as store:
        for _ in range(3):
            one_pass(store, (4, 5, 0, 1))
        assert store.stats().seeks == 0
    with streaming(4 * LAYER_BYTES, 600_000, system, visits=[Layers(0, 2), Layers(4, 6)]) as store:
        for _ in range(3):
            one_pass(store, (4, 5, 0, 1))
        assert store.stats().seeks == 1  # to the first; then it comes round


def test_a_visit_that_is_repeated_is_read_again_and_counted() -> None:
    with streaming(ALL, 700_000) as store:
        one_pass(store, (0, 1, 0, 1, 2, 3, 4, 5))
        stats = store.stats()
        assert stats.seeks == 1
        assert stats.read_bytes >= 8 * LAYER_BYTES


def test_layers_that_are_held_together_need_not_all_fit_the_buffer() -> None:
    with streaming(ALL, 700_000) as store:
        for layer in range(N_LAYERS):
            store.acquire(layer)
        assert store.stats().missed_bytes > 0
        for layer in range(N_LAYERS):
            assert_layer(store, layer)  # acquired a second time
            store.release(layer)
        one_pass(store)


def test_what_was_used_through_the_map_is_dropped_when_it_is_released() -> None:
    system = FakeSystem()
    with streaming(ALL, 700_000, system) as store:
        for layer in range(3):
            store.acquire(layer)
        system.dropped.clear()
        for layer in range(3):
            store.release(layer)
        missed = store.stats().missed_bytes
        assert sum(n_bytes for _, n_bytes in system.dropped) == missed > 0


def test_a_buffer_that_is_too_small_is_refused_with_what_is_needed() -> None:
    needs = r"buffer of 300,000 bytes, but a layer's need (\d{3},\d{3}).*at least"
    with pytest.raises(PlanError, match=needs) as error, streaming(ALL, 300_000):
        pass
    least = int(str(error.value).split("need ")[1].split(" ")[0].replace(",", ""))
    assert LAYER_BYTES + 81_920 < least < LAYER_BYTES + 81_920 + 20 * 512
    with streaming(ALL, least) as store:
        one_pass(store)
        assert store.stats().missed_bytes == 0


def test_what_came_into_memory_along_with_other_weights_is_dropped_at_the_start() -> None:
    system = FakeSystem()
    with streaming(HALF, system=system) as store:
        assert sum(n_bytes for _, n_bytes in system.dropped) == store.stats().streamed_bytes


def test_a_closed_store_has_no_thread_and_no_file_and_closes_twice() -> None:
    system = FakeSystem()
    with streaming(HALF, system=system) as store:
        one_pass(store)
        store.close()
        assert not any(thread.name.startswith("prima-reader") for thread in threading.enumerate())
        assert system.open_files == 0


# ---------------------------------------------------------------- the ends


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 of 64 rows and one of 52."""
    monkeypatch.setattr(residency, "BLOCK_BYTES", 64 * 512)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_comes_in_blocks_of_rows_after_the_layers(tied: bool) -> None:
    model = big_enough(tied)
    name = "token_embd.weight" if tied else "output.weight"
    with streaming(10**9, 700_000, model=model, ends=ends_of(model)) as store:
        assert store.is_streamed(name)
        for _ in range(3):
            one_pass(store) if not tied else None
            assert assert_blocks(store, name, model) == [64] * 7 + [52]
        assert store.stats().missed_bytes == 0
        assert store.stats().seeks == (3 if tied else 0)


@pytest.mark.usefixtures("small_blocks")
def test_only_as_much_of_the_output_is_streamed_as_must_be() -> None:
    model = big_enough()
    table = 500 * 512
    system = FakeSystem()
    with streaming(table + ALL + 100_000, 700_000, system, ends=ends_of(model)) as store:
        assert [weight.shape[0] for weight in store.pinned_ends()] == [128, 64 * 4]  # of the norm, of the output
        for _ in range(2):
            one_pass(store)
            assert assert_blocks(store, "output.weight", model) == [64] * 7 + [52]
        assert table + ALL + 100_000 <= store.stats().streamed_bytes < table + ALL + 100_000 + 64 * 512


def test_an_output_that_stays_is_one_run() -> None:
    model = big_enough()
    with streaming(HALF + 500 * 512, ends=ends_of(model)) as store:
        assert not store.is_streamed("output.weight")
        assert assert_blocks(store, "output.weight", model) == [500]
        assert store.is_streamed("token_embd.weight")  # looked up, never read as a whole
        assert [weight.name for weight in store.pinned_ends()] == ["output_norm.weight", "output.weight"]
        assert next(store.blocks("token_embd.weight")) is store.shared()["token_embd.weight"]


@pytest.mark.usefixtures("small_blocks")
def test_blocks_need_not_be_asked_for_to_the_end() -> None:
    model = big_enough()
    with streaming(10**9, 700_000, ends=ends_of(model)) as store:
        for _ in range(5):
            one_pass(store)
            blocks = store.blocks("output.weight")
            next(blocks)
            next(blocks)
            blocks.close()  # type: ignore[attr-defined]  # a generator
        assert store.stats().missed_bytes == 0


# ---------------------------------------------------------------- any order


class Story:
    """What a store is asked for, one thing after the other; some layers stay acquired for a while."""

    def __init__(self, store: Store, exits: ExitStack) -> None:
        self.store, self.exits = store, exits
        self.held: list[int] = []

    def tell(self, chapter: tuple[str, int]) -> None:
        what, number = chapter
        layer = number % N_LAYERS
        if what == "pass":
            one_pass(self.store)
        elif what == "visit":
            one_pass(self.store, range(layer, min(layer + 2, N_LAYERS)))
        elif what == "output":
            assert_blocks(self.store, "output.weight", big_enough())
        elif what == "resize":
            self.store.resize(number * 10_000)  # type: ignore[attr-defined]  # of a StreamingStore
        elif what == "hold" and layer not in self.held:
            self.store.acquire(layer)
            self.held.append(layer)
        elif what == "let go" and self.held:
            self.let_go(self.held.pop(number % len(self.held)))

    def let_go(self, layer: int) -> None:
        assert_layer(self.store, layer)
        self.store.release(layer)


chapters = st.lists(
    st.tuples(st.sampled_from(["pass", "visit", "output", "resize", "hold", "let go"]), st.integers(0, 400)),
    max_size=14,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 4_000_000), st.integers(0, 1_500_000), st.integers(9, 17), st.booleans(), chapters)
def test_any_order_gives_the_bytes_of_the_file(
    streamed: int, more_buffer: int, piece: int, in_two_visits: bool, asked: list[tuple[str, int]]
) -> None:
    visits = [Layers(3, N_LAYERS), Layers(0, 3)] if in_two_visits else [Layers(0, N_LAYERS)]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as exits:
        patch.setattr(reader, "PIECE_BYTES", 1 << piece)
        patch.setattr(residency, "BLOCK_BYTES", 64 * 512)
        store = exits.enter_context(
            streaming(streamed, 615_000 + more_buffer, visits=visits, ends=ends_of(big_enough()))
        )
        story = Story(store, exits)
        for chapter in asked:
            story.tell(chapter)
        for layer in story.held:
            story.let_go(layer)
        one_pass(store)
