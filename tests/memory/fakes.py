"""A system over plain files that records what it is asked for and fails as it is told, and small models to stream."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.interfaces import Layers, Slice, Store, Weight
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import DirectFile, Memory, System
from prima_core.model.weights import Model, end_tensors
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

N_LAYERS = 6
ALIGNMENT = 512


@dataclass
class FakeFile:
    system: FakeSystem
    path: Path
    alignment: int = ALIGNMENT

    def read(self, into: memoryview, offset: int) -> int:
        assert offset % ALIGNMENT == 0, offset
        assert len(into) % ALIGNMENT == 0, len(into)
        self.system.begin_read(self.path, offset, len(into))
        with open(self.path, "rb") as file:
            file.seek(offset)
            return min(file.readinto(into), self.system.at_most(offset, len(into)))

    def close(self) -> None:
        self.system.open_files -= 1


@dataclass
class FakeSystem:
    """`fault` is asked at each read of an offset, in the reader's thread: it may raise, or wait for an event. Behind
    `end` files are as if they had been truncated."""

    fault: Callable[[int], None] = lambda offset: None
    end: int = 1 << 60
    reads: list[tuple[int, int]] = field(default_factory=list)
    populated: list[int] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes
    forgotten: int = 0
    buffers: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    open_files: int = 0
    resident: float | None = 1.0
    is_disk_broken: bool = False
    is_full: bool = False

    def begin_read(self, path: Path, offset: int, n_bytes: int) -> None:
        self.reads.append((offset, n_bytes))
        self.fault(offset)

    def at_most(self, offset: int, n_bytes: int) -> int:
        return max(0, min(n_bytes, self.end - offset))

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40)

    def pressure(self) -> float | None:
        return None

    def open_direct(self, path: Path) -> DirectFile:
        self.open_files += 1
        return FakeFile(self, path)

    def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
        self.buffers.append(n_bytes)
        return memoryview(mmap.mmap(-1, n_bytes))[:n_bytes]

    def claim(self, part: memoryview) -> None:
        if self.is_full:
            raise MemoryError(f"no {len(part)} bytes")

    def release(self, part: memoryview) -> None:
        """Who computes with what was given back is found out: as the scale of a block it is NaN."""
        self.released.append(len(part))
        np.frombuffer(part, np.uint8)[:] = 0xFF

    def populate(self, data: NDArray[np.uint8]) -> None:
        if self.is_disk_broken:
            raise OSError(5, "Input/output error")
        self.populated.append(len(data))

    def forget(self, data: NDArray[np.uint8]) -> None:
        self.forgotten += len(data)

    def drop(self, data: NDArray[np.uint8], path: Path, offset: int) -> None:
        self.dropped.append((offset, len(data)))

    def resident_bytes(self, data: NDArray[np.uint8], path: Path) -> int | None:
        return None if self.resident is None else int(len(data) * self.resident)


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


def big_enough(tied: bool = False) -> Model:
    """A model whose matrices are large enough to be streamed: 0.5 MB a layer, 0.25 MB of output."""
    return _written(tied)


@cache
def _written(tied: bool) -> Model:
    shape = TinyModel(
        n_layers=N_LAYERS, d_model=128, n_heads=4, n_kv_heads=4, d_ff=160, vocab_size=500, tied_output=tied
    )
    return open_model(write_tiny_model(Path(_folder().name) / f"{tied}.gguf", shape))


def ends_of(model: Model) -> tuple[str, ...]:
    return end_tensors(model.spec, Slice((), has_input=True, has_output=True))


@contextmanager
def streaming(
    streamed_bytes: int,
    buffer_bytes: int = 1_000_000,
    system: System | None = None,
    model: Model | None = None,
    visits: Sequence[Layers] = (Layers(0, N_LAYERS),),
    ends: Sequence[str] = (),
    host_bytes: int | None = None,
) -> Iterator[StreamingStore]:
    """A started store."""
    model = model or big_enough()
    sizes = streamed_bytes, buffer_bytes
    store = StreamingStore(model.file, model.spec, visits, ends, *sizes, system or FakeSystem(), host_bytes)
    try:
        store.start()
        yield store
    finally:
        store.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("prima-reader")]


def assert_layer(store: Store, layer: int) -> None:
    """The store gives the very bytes of the file."""
    expected = big_enough().store().views(layer)
    given = store.acquire(layer)
    assert given.keys() == expected.keys()
    for name, weight in given.items():
        assert_same(weight, expected[name])
    store.release(layer)


def assert_blocks(store: Store, name: str, model: Model) -> list[int]:
    """How many rows each block of the output has, which together are the file's."""
    whole = model.file.view(name)
    rows: list[int] = []
    for block in store.blocks(name):
        start = sum(rows)
        rows.append(block.shape[0])
        assert_same(block, whole.part(start, start + rows[-1]))
    assert sum(rows) == whole.shape[0]
    return rows


def assert_same(weight: Weight, expected: Weight) -> None:
    assert (weight.name, weight.type, weight.shape) == (expected.name, expected.type, expected.shape)
    assert not weight.data.flags.writeable
    np.testing.assert_array_equal(weight.data, expected.data)
