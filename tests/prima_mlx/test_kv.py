"""The cache in MLX's arrays: what stands where, what is copied, what is counted. Steps that cannot be are refused as
by every cache (`arch/kvsteps.py`)."""

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import DeviceMemoryError, FrameError, ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Step
from prima_mlx.kv import MlxKv, Room, read
from prima_numpy.kv import NumpyKv
from prima_numpy.kv import read as numpy_read
from prima_numpy.kv import write as numpy_write

FloatArray = NDArray[np.float32]
ALL = Layers(0, 3)
N_KV_HEADS, HEAD_DIM = 2, 4
PLENTY = 1 << 40


def cache(type: KvType = KvType.F32, head_dim: int = HEAD_DIM, available: int = PLENTY) -> MlxKv:
    return MlxKv([ALL], N_KV_HEADS, head_dim, type, lambda: available)


def open_(sequence: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.OPEN, sequence, capacity=capacity)


def fork(sequence: int, source: int, length: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.FORK, sequence, length, capacity, source)


def move(sequence: int, source: int, length: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.MOVE, sequence, length, capacity, source)


def drop(sequence: int) -> KvOp:
    return KvOp(KvKind.DROP, sequence)


def fill(kv: MlxKv, chunk: Chunk, value: float, *operations: KvOp, layers: Layers = ALL) -> None:
    """Write `value` + layer as K, and its negative as V."""
    at = kv.begin(layers, Step((chunk,), operations))
    for layer in layers:
        rows = mx.full((chunk.count, N_KV_HEADS * HEAD_DIM), value + layer)
        at.rooms[layer][chunk.sequence].write(chunk, rows, -rows)


def room(kv: MlxKv, sequence: int, layer: int = 0) -> Room:
    return kv.begin(Layers(0, 0), Step(())).rooms[layer][sequence]


def lengths(kv: MlxKv, layer: int = 0) -> dict[int, int]:
    return {sequence: held.length for sequence, held in kv.begin(Layers(0, 0), Step(())).rooms[layer].items()}


def keys(kv: MlxKv, sequence: int, layer: int = 0) -> list[float]:
    """The first value of head 0 at each written position."""
    held = room(kv, sequence, layer)
    return list(np.array(read(held.k, 0, held.length, mx.float32))[0, :, 0])


def test_positions_are_written_where_the_chunk_says_by_head() -> None:
    kv = cache()
    at = kv.begin(ALL, Step((Chunk(5, 0, 2),), (open_(5),)))
    k = mx.arange(2 * N_KV_HEADS * HEAD_DIM).reshape(2, -1).astype(mx.float32)
    at.rooms[1][5].write(Chunk(5, 0, 2), k, k + 100)
    held = room(kv, 5, layer=1)
    values = np.array(read(held.k, 0, 2, mx.float32))
    np.testing.assert_array_equal(values[1, 0], [4, 5, 6, 7])  # head 1 of position 0
    np.testing.assert_array_equal(values[0, 1], [8, 9, 10, 11])  # head 0 of position 1
    np.testing.assert_array_equal(np.array(read(held.v, 0, 2, mx.float32)), values + 100)
    assert (held.length, room(kv, 5, layer=0).length) == (2, 0)


def test_operations_apply_in_their_order_to_the_visited_layers_before_the_chunks() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 4), 1, open_(0))
    operations = (fork(1, 0, 2), drop(0), open_(0, 3), move(1, 1, 1), drop(7))
    kv.begin(Layers(1, 3), Step((Chunk(0, 0, 1), Chunk(1, 1, 1)), operations))
    assert lengths(kv, layer=1) == {0: 0, 1: 1}
    assert room(kv, 0, layer=1).capacity == 3
    assert lengths(kv, layer=0) == {0: 4}


def test_a_refused_step_changes_nothing() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 2), 1, open_(0))
    fill(kv, Chunk(0, 2, 1), 1, layers=Layers(0, 2))  # the last layer missed it
    with pytest.raises(FrameError, match="leaves a gap: 2 positions"):
        kv.begin(ALL, Step((Chunk(0, 3, 1),), (open_(1),)))
    assert lengths(kv) == {0: 3}


def test_dropped_and_closed_rooms_are_given_back() -> None:
    kv = cache(KvType.F16, 64)
    before = mx.get_active_memory()
    kv.begin(ALL, Step((), (open_(0, 1000), open_(1, 700))))
    assert kv.reserved_bytes == 3 * 1700 * 2 * N_KV_HEADS * 64 * 2
    assert mx.get_active_memory() - before >= kv.reserved_bytes
    kv.begin(ALL, Step((), (drop(0),)))
    assert kv.reserved_bytes == 3 * 700 * 2 * N_KV_HEADS * 64 * 2
    kv.close()
    kv.close()
    assert (kv.reserved_bytes, mx.get_active_memory()) == (0, before)


@pytest.mark.parametrize("type", KvType)
def test_a_room_takes_the_bytes_that_are_counted(type: KvType) -> None:
    kv = cache(type, 64)
    kv.begin(Layers(0, 1), Step((), (open_(0, 10),)))
    held = room(kv, 0)
    assert sum(array.nbytes for array in (*held.k, *held.v)) == kv.reserved_bytes


def test_positions_are_written_in_place() -> None:
    """A room of 8 MB, of which no second copy is made."""
    kv = cache(KvType.F32, 128)
    at = kv.begin(Layers(0, 1), Step((), (open_(0, 8192),)))
    rows, held = mx.ones((1, N_KV_HEADS * 128)), at.rooms[0][0]
    for position in range(3):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        held.write(Chunk(0, position, 1), rows, rows)
        seen = read(held.k, 0, position + 1, mx.float32).sum() + read(held.v, 0, position + 1, mx.float32).sum()
        mx.eval(seen)
        assert mx.get_peak_memory() - before < 1e6


# ---------------------------------------------------------------- memory


def test_a_step_without_room_is_refused_before_anything_changes() -> None:
    position = 2 * N_KV_HEADS * HEAD_DIM * 4  # bytes in one layer
    kv = cache(available=3 * 20 * position)
    with pytest.raises(DeviceMemoryError, match="KV of this step needs"):
        kv.begin(ALL, Step((), (open_(0), open_(1, 13))))
    assert lengths(kv) == {}
    kv.begin(ALL, Step((), (open_(0), open_(1, 12))))


def test_what_a_step_gives_back_makes_room_in_the_next_layer() -> None:
    """Three layers of 8 positions are copied to 6 each: one copy beside its source at a time."""
    position = 2 * N_KV_HEADS * HEAD_DIM * 4
    kv = MlxKv([ALL], N_KV_HEADS, HEAD_DIM, KvType.F32, lambda: left[0])
    left = [PLENTY]
    fill(kv, Chunk(0, 0, 4), 1, open_(0))
    left[0] = 6 * position - 1
    with pytest.raises(DeviceMemoryError):
        kv.begin(ALL, Step((), (move(0, 0, 4, capacity=6),)))
    left[0] += 1
    kv.begin(ALL, Step((), (move(0, 0, 4, capacity=6),)))
    assert keys(kv, 0, layer=2) == [3] * 4
    left[0] = 0
    kv.begin(ALL, Step((), (move(1, 0, 4, capacity=6), move(1, 1, 2, capacity=6), drop(0))))  # these take nothing
    assert lengths(kv) == {1: 2}


def test_a_wild_capacity_is_an_error() -> None:
    with pytest.raises(DeviceMemoryError):
        cache().begin(ALL, Step((), (open_(0, 1 << 62),)))


# ---------------------------------------------------------------- what is kept of a value


@pytest.mark.parametrize("type", KvType)
def test_values_are_rounded_as_the_numpy_backend_rounds_them(type: KvType) -> None:
    rows = np.random.default_rng(3).standard_normal((5, N_KV_HEADS * 64), np.float32)
    rows[1, :32], rows[2, 3], rows[3, 70] = 0, np.nan, np.inf
    chunk, opening = Chunk(0, 1, 5), Step((Chunk(0, 0, 1),), (open_(0),))
    ours, theirs = cache(type, 64), NumpyKv([ALL], N_KV_HEADS, 64, type)
    held, by_numpy = (kv.begin(ALL, opening).rooms[0][0] for kv in (ours, theirs))
    assert isinstance(held, Room)
    assert not isinstance(by_numpy, Room)
    held.write(chunk, mx.array(rows), mx.array(-rows))
    numpy_write(by_numpy, chunk, rows, -rows)
    for half, other in ((held.k, by_numpy.k), (held.v, by_numpy.v)):
        np.testing.assert_array_equal(np.array(read(half, 1, 6, mx.float32)), numpy_read(other, slice(1, 6)))


@pytest.mark.parametrize("head_dim", [4, 48, 80])
def test_heads_that_are_no_whole_runs_are_refused_with_a_way_out(head_dim: int) -> None:
    with pytest.raises(ModelError, match=f"heads of {head_dim} values.*--kv-type f16"):
        cache(KvType.Q8_0, head_dim)
