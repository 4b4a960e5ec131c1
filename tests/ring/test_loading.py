from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from prima_core.interfaces import Layers, Slice
from prima_core.ring.loading import LoadingStore
from prima_core.ring.serving import Holding
from tests.arch.small import small_model, small_spec
from tests.ring.fakes import FakeStore

MODEL = small_model(small_spec())
ENDS = Slice((Layers(1, 3),), has_input=True, has_output=True)


def loading(part: Slice, tell: Callable[[int, int], None], ends: Sequence[str] = (), streamed: int = 0) -> LoadingStore:
    store = FakeStore(MODEL, Holding(part.layers, tuple(ends), streamed, streamed))
    return LoadingStore(store, MODEL.spec, [part], tell)


def test_progress_grows_as_layers_are_bound_and_ends_at_all_bytes() -> None:
    told: list[tuple[int, int]] = []
    store = loading(ENDS, lambda done, total: told.append((done, total)))
    store.shared()
    for layer in (1, 2, 1):  # once more: nothing is read again
        store.acquire(layer)
        store.release(layer)
    done, totals = [done for done, _ in told], {total for _, total in told}
    assert done == sorted(done)
    assert totals == {done[-1]}


def test_looking_at_views_reads_nothing() -> None:
    told: list[int] = []
    store = loading(ENDS, lambda done, total: told.append(done))
    assert store.views(1).keys() == store.acquire(2).keys()
    n_told = len(told)
    store.views(1)
    assert len(told) == n_told


def test_layers_of_others_and_ends_of_others_are_not_read() -> None:
    told: list[int] = []
    store = loading(Slice((Layers(1, 2),)), lambda done, total: told.append(done))
    store.shared()
    store.acquire(0)
    assert not told


def test_who_is_told_may_end_the_load() -> None:
    def refuse(done: int, total: int) -> None:
        raise InterruptedError

    store = loading(ENDS, refuse)
    with pytest.raises(InterruptedError):
        store.acquire(1)


def test_what_is_kept_of_the_ends_is_read() -> None:
    told: list[int] = []
    store = loading(ENDS, lambda done, total: told.append(total), ends=["output_norm.weight"])
    store.shared()
    assert told


def test_weights_that_are_streamed_are_not_read() -> None:
    told: list[int] = []
    store = loading(ENDS, lambda done, total: told.append(done), streamed=1)
    store.shared()
    store.acquire(1)
    assert told == []
