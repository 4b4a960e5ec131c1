"""Bad days of a disk: whoever asks for the weights is told, and nothing hangs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.memory import reader
from prima_core.memory.store import StreamingStore
from tests.memory.fakes import N_LAYERS, FakeSystem, assert_layer, big_enough, ends_of, streaming

LAYER_BYTES = 4 * 65_536 + 3 * 81_920
ALL = N_LAYERS * LAYER_BYTES


def offset_of(name: str) -> int:
    return big_enough().file.tensors[name].offset // 512 * 512


def failing_at(name: str, times: list[int]) -> Callable[[int], None]:
    """Reads of a tensor fail as often as `times` has entries."""

    def fault(offset: int) -> None:
        if offset == offset_of(name) and times:
            times.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fault


def test_a_read_that_fails_is_told_where_its_layer_is_asked_for_and_tried_again_then() -> None:
    tensor = big_enough().file.tensors["blk.2.attn_q.weight"]
    with streaming(ALL, 1_000_000, FakeSystem(failing_at(tensor.name, [1, 1]))) as store:
        assert_layer(store, 0)
        assert_layer(store, 1)
        for _ in range(2):
            with pytest.raises(
                ModelError, match=rf"False.gguf cannot be read at byte {tensor.offset} \(blk.2.attn_q.weight\): Input"
            ) as error:
                store.acquire(2)
            assert error.value.field == "file"
        for layer in (2, 3, 4, 5, 0, 1, 2):
            assert_layer(store, layer)


def test_a_broken_disk_is_asked_only_when_somebody_asks() -> None:
    system = FakeSystem(failing_at("blk.0.attn_q.weight", [1] * 10_000))
    with streaming(ALL, 1_000_000, system) as store:
        for _ in range(5):
            with pytest.raises(ModelError):
                store.acquire(0)
    assert sum(offset == offset_of("blk.0.attn_q.weight") for offset, _ in system.reads) == 5


def test_other_layers_are_there_while_one_cannot_be_read() -> None:
    with streaming(ALL, 1_000_000, FakeSystem(failing_at("blk.2.attn_q.weight", [1] * 100))) as store:
        with pytest.raises(ModelError):
            store.acquire(2)
        for layer in (3, 4, 5, 0, 1):
            assert_layer(store, layer)
        with pytest.raises(ModelError):
            store.acquire(2)


def test_a_file_that_became_shorter_is_told() -> None:
    tensor = big_enough().file.tensors["blk.4.ffn_down.weight"]
    system = FakeSystem(end=tensor.offset + tensor.n_bytes - 1)
    with streaming(ALL, 1_000_000, system) as store:
        for layer in range(4):
            assert_layer(store, layer)
        with pytest.raises(ModelError, match=r"blk\.4\.ffn_down.*truncated"):
            store.acquire(4)
        system.end = tensor.offset + tensor.n_bytes  # whole, but for what lies behind it
        assert_layer(store, 4)


def test_whatever_a_reader_meets_is_told() -> None:
    def fault(offset: int) -> None:
        raise ValueError("an address that is not aligned")

    with streaming(ALL, 1_000_000, FakeSystem(fault)) as store:
        for _ in range(2):
            with pytest.raises(ModelError, match="ValueError: an address"):
                store.acquire(0)


class Gate:
    """Reads wait until it is opened."""

    def __init__(self) -> None:
        self.is_open, self.is_reached = threading.Event(), threading.Event()

    def __call__(self, offset: int) -> None:
        self.is_reached.set()
        assert self.is_open.wait(30)


class Asking(threading.Thread):
    """Acquires a layer, and keeps what came of it."""

    def __init__(self, store: StreamingStore, layer: int) -> None:
        super().__init__()
        self.store, self.layer = store, layer
        self.error: ModelError | None = None
        self.start()

    def run(self) -> None:
        try:
            assert_layer(self.store, self.layer)
        except ModelError as error:
            self.error = error


def test_who_asks_waits_for_a_slow_disk_and_that_is_counted() -> None:
    gate = Gate()
    with streaming(ALL, 1_000_000, FakeSystem(gate)) as store:
        asking = Asking(store, 0)
        assert gate.is_reached.wait(30)
        assert asking.is_alive()
        gate.is_open.set()
        asking.join()
        assert asking.error is None
        assert store.stats().stall_s > 0


def test_closing_wakes_who_waits_even_while_the_disk_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "JOIN_S", 0.01)
    gate = Gate()
    with streaming(ALL, 1_000_000, FakeSystem(gate)) as store:
        asking = Asking(store, 0)
        assert gate.is_reached.wait(30)
        store.close()
        asking.join()
        gate.is_open.set()
        for thread in threading.enumerate():
            if thread.name.startswith("prima-reader"):
                thread.join()
    assert asking.error is not None
    assert "closed" in str(asking.error)


def test_a_disk_that_gives_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "STALLED_AFTER_S", 0.01)
    gate = Gate()
    with streaming(ALL, 1_000_000, FakeSystem(gate)) as store:
        with pytest.raises(ModelError, match="gave nothing for"):
            store.acquire(0)
        gate.is_open.set()
        monkeypatch.setattr(reader, "STALLED_AFTER_S", 30.0)
        assert_layer(store, 0)


def test_a_file_that_cannot_be_opened_past_the_cache_is_told() -> None:
    class NoFiles(FakeSystem):
        def open_direct(self, path):  # type: ignore[no-untyped-def]
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(ModelError, match="cannot be read: Too many open files"), streaming(ALL, system=NoFiles()):
        pass


def test_stations_that_are_all_emptied_while_they_are_looked_at_end_the_reading_and_not_the_reader() -> None:
    class Emptied(list[tuple[reader.Unit, ...]]):
        """Others take the last one back behind the first look at it."""

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            found, self[index] = super().__getitem__(index), ()
            return found

    unit = reader.Unit("blk.0.attn_q.weight", 0, 0, 1000)
    system = FakeSystem()
    path = big_enough().path
    reading = reader.ReadAhead(
        Emptied([(unit,), ()]), [system.open_direct(path)], [path], system.buffer(4096), reader.ReadCounts()
    )
    asking = threading.Thread(target=lambda: asked.append(reading.take(0)), daemon=True)
    asked: list[object] = []
    asking.start()
    asking.join(30)
    assert len(asked) == 1
    reading.close()
    assert not [thread for thread in reading._threads if thread.is_alive()]


def test_files_that_were_changed_are_refused_however_often_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(big_enough().path.read_bytes())
    with open_model(path) as model:
        system = FakeSystem()
        with streaming(0, 0, system, model) as store:
            store.resize(0)
            os.utime(path, ns=(1, 1))
            for _ in range(2):
                with pytest.raises(ModelError, match="changed or replaced"):
                    store.acquire(0)
            assert system.open_files == 0


def test_a_block_may_be_let_go_after_the_store_was_closed() -> None:
    with streaming(1 << 40, ends=ends_of(big_enough())) as store:
        blocks = store.blocks("output.weight")
        next(blocks)
    blocks.close()  # type: ignore[attr-defined]
