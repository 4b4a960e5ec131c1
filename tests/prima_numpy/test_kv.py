from dataclasses import replace

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import DeviceMemoryError, FrameError, ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Step
from prima_numpy.kv import NumpyKv, Room, read, write

FloatArray = NDArray[np.float32]
ALL = Layers(0, 3)
N_KV_HEADS, HEAD_DIM = 2, 4


def cache(type: KvType = KvType.F32, head_dim: int = HEAD_DIM) -> NumpyKv:
    return NumpyKv([ALL], N_KV_HEADS, head_dim, type)


def open_(sequence: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.OPEN, sequence, capacity=capacity)


def fork(sequence: int, source: int, length: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.FORK, sequence, length, capacity, source)


def move(sequence: int, source: int, length: int, capacity: int = 8) -> KvOp:
    return KvOp(KvKind.MOVE, sequence, length, capacity, source)


def drop(sequence: int) -> KvOp:
    return KvOp(KvKind.DROP, sequence)


def fill(kv: NumpyKv, chunk: Chunk, value: float, *operations: KvOp, layers: Layers = ALL) -> None:
    """Write `value` + layer as K, and its negative as V."""
    at = kv.begin(layers, Step((chunk,), operations))
    for layer in layers:
        rows = np.full((chunk.count, N_KV_HEADS * HEAD_DIM), value + layer, np.float32)
        write(at.rooms[layer][chunk.sequence], chunk, rows, -rows)


def room(kv: NumpyKv, sequence: int, layer: int = 0) -> Room:
    return kv.begin(Layers(0, 0), Step(())).rooms[layer][sequence]


def lengths(kv: NumpyKv) -> dict[int, int]:
    return {sequence: held.length for sequence, held in kv.begin(Layers(0, 0), Step(())).rooms[0].items()}


def test_positions_are_written_where_the_chunk_says_by_head() -> None:
    kv = cache()
    at = kv.begin(ALL, Step((Chunk(5, 0, 2),), (open_(5),)))
    k = np.arange(2 * N_KV_HEADS * HEAD_DIM, dtype=np.float32).reshape(2, -1)
    write(at.rooms[1][5], Chunk(5, 0, 2), k, k + 100)
    held = room(kv, 5, layer=1)
    np.testing.assert_array_equal(held.k[1, 0], [4, 5, 6, 7])  # head 1 of position 0
    np.testing.assert_array_equal(held.k[0, 1], [8, 9, 10, 11])  # head 0 of position 1
    np.testing.assert_array_equal(held.v[:, :2], held.k[:, :2] + 100)
    assert (held.length, room(kv, 5, layer=0).length) == (2, 0)


def test_rewritten_positions_forget_what_stood_after_them() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    fill(kv, Chunk(0, 2, 1), 9)
    assert lengths(kv) == {0: 3}
    with pytest.raises(FrameError, match="leaves a gap: 3 positions"):
        kv.begin(ALL, Step((Chunk(0, 5, 1),)))


def test_fork_copies_and_then_lives_alone() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 4), 1, open_(0))
    fill(kv, Chunk(1, 3, 1), 9, fork(1, 0, length=3, capacity=5))
    assert lengths(kv) == {0: 4, 1: 4}
    np.testing.assert_array_equal(room(kv, 1, layer=2).k[0, :4, 0], [3, 3, 3, 11])
    np.testing.assert_array_equal(room(kv, 0, layer=2).k[0, :4, 0], [3, 3, 3, 3])
    assert room(kv, 1).capacity == 5


@pytest.mark.parametrize("capacity", [8, 5, 20], ids=["as large", "smaller", "larger"])
def test_what_is_moved_is_the_same_under_another_number(capacity: int) -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    fill(kv, Chunk(1, 4, 1), 9, move(1, 0, length=4, capacity=capacity))
    assert lengths(kv) == {1: 5}
    np.testing.assert_array_equal(room(kv, 1, layer=2).k[0, :5, 0], [3, 3, 3, 3, 11])
    np.testing.assert_array_equal(room(kv, 1, layer=2).v[1, :5, 3], [-3, -3, -3, -3, -11])
    assert room(kv, 1).capacity == capacity


def test_a_move_within_the_same_capacity_takes_no_memory() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    before = room(kv, 0).k
    kv.begin(ALL, Step((), (move(1, 0, 4),)))
    assert room(kv, 1).k is before


def test_a_move_onto_itself_changes_the_capacity() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    kv.begin(ALL, Step((), (move(0, 0, 6, capacity=6),)))
    assert (lengths(kv), room(kv, 0).capacity) == ({0: 6}, 6)
    assert kv.reserved_bytes == 6 * position_bytes(KvType.F32)
    np.testing.assert_array_equal(room(kv, 0, layer=1).k[0, :, 0], [2] * 6)


def test_operations_of_a_step_may_build_on_each_other() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    kv.begin(ALL, Step((), (move(0, 0, 6, capacity=6), fork(1, 0, 3), move(2, 0, 5, capacity=6), move(3, 1, 2, 9))))
    assert lengths(kv) == {2: 5, 3: 2}
    assert [room(kv, sequence).capacity for sequence in (2, 3)] == [6, 9]


def test_operations_apply_in_their_order_before_the_chunks() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 4), 1, open_(0))
    kv.begin(ALL, Step((Chunk(0, 0, 1), Chunk(1, 2, 1)), (fork(1, 0, 2), drop(0), open_(0, 3), move(1, 1, 2))))
    assert lengths(kv) == {0: 0, 1: 2}
    assert room(kv, 0).capacity == 3


def test_drop_is_idempotent_and_gives_room_back() -> None:
    kv = cache()
    kv.begin(ALL, Step((), (drop(3), open_(3), open_(4))))
    kv.begin(ALL, Step((), (drop(3), drop(3))))
    assert lengths(kv) == {4: 0}


def test_operations_touch_the_visited_layers_only() -> None:
    kv = NumpyKv([Layers(0, 2), Layers(4, 6)], N_KV_HEADS, HEAD_DIM, KvType.F32)
    at = kv.begin(Layers(4, 6), Step((), (open_(0),)))
    assert {layer: set(rooms) for layer, rooms in at.rooms.items()} == {0: set(), 1: set(), 4: {0}, 5: {0}}


def position_bytes(type: KvType, head_dim: int = HEAD_DIM) -> float:
    """Of one position of a sequence, in the three layers."""
    return 3 * 2 * N_KV_HEADS * head_dim * {KvType.F32: 4, KvType.F16: 2, KvType.Q8_0: 34 / 32}[type]


def test_memory_is_counted() -> None:
    kv = cache(KvType.F16)
    kv.begin(ALL, Step((), (open_(0, 10), open_(1, 7))))
    assert kv.reserved_bytes == 17 * position_bytes(KvType.F16)
    kv.begin(ALL, Step((), (drop(0),)))
    assert kv.reserved_bytes == 7 * position_bytes(KvType.F16)
    kv.close()
    kv.close()
    assert kv.reserved_bytes == 0


@pytest.mark.parametrize("type", KvType)
@pytest.mark.parametrize("head_dim", [32, 96])
def test_an_open_room_takes_the_bytes_that_are_counted(type: KvType, head_dim: int) -> None:
    kv = cache(type, head_dim)
    kv.begin(ALL, Step((), (open_(0, 10),)))
    assert kv.reserved_bytes == 10 * position_bytes(type, head_dim)


# ---------------------------------------------------------------- what is kept of a value


def kept(type: KvType, k: FloatArray) -> tuple[Room, FloatArray]:
    """The room of rows k [n, N_KV_HEADS * head_dim] from position 1 on, and what is read of them again."""
    n, chunk = len(k), Chunk(0, 1, len(k))
    held = kv_room(type, k.shape[1] // N_KV_HEADS, n + 2)
    write(held, chunk, k, -k)
    np.testing.assert_array_equal(read(held.v, slice(1, n + 1)), -read(held.k, slice(1, n + 1)))
    return held, read(held.k, slice(1, n + 1)).swapaxes(0, 1).reshape(k.shape)


def kv_room(type: KvType, head_dim: int, capacity: int) -> Room:
    kv = cache(type, head_dim)
    kv.begin(ALL, Step((), (open_(0, capacity),)))
    return room(kv, 0)


ROWS = np.random.default_rng(3).standard_normal((5, N_KV_HEADS * 64), np.float32)


def test_f32_keeps_all_and_f16_rounds() -> None:
    np.testing.assert_array_equal(kept(KvType.F32, ROWS)[1], ROWS)
    np.testing.assert_array_equal(kept(KvType.F16, ROWS)[1], ROWS.astype(np.float16))


def test_q8_0_keeps_runs_of_32_as_a_gguf_file_does() -> None:
    """Half a step off at most, and what the rounding of the scale to f16 adds."""
    held, values = kept(KvType.Q8_0, ROWS)
    by_gguf = gguf.quants.dequantize(held.k[:, 1:6], gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(by_gguf.swapaxes(0, 1).reshape(ROWS.shape), values)
    step = np.abs(ROWS.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(values - ROWS).reshape(-1, 32) <= step * (0.5 + 127 / 2**11))


def test_q8_0_of_zeros_is_zero_and_of_what_is_not_finite_not_finite() -> None:
    rows = np.zeros((3, N_KV_HEADS * 32), np.float32)
    rows[1, 3], rows[2, 40] = np.nan, np.inf
    values = kept(KvType.Q8_0, rows)[1]
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_array_equal(np.isnan(values[1]), [True] * 32 + [False] * 32)
    np.testing.assert_array_equal(np.isnan(values[2]), [False] * 32 + [True] * 32)


@pytest.mark.parametrize("head_dim", [4, 48, 80])
def test_heads_that_are_no_whole_runs_are_refused_with_a_way_out(head_dim: int) -> None:
    with pytest.raises(ModelError, match=f"heads of {head_dim} values.*--kv-type f16"):
        cache(KvType.Q8_0, head_dim)


def test_a_fork_copies_blocks() -> None:
    kv = cache(KvType.Q8_0, 32)
    at = kv.begin(ALL, Step((Chunk(0, 0, 3),), (open_(0),)))
    rows = ROWS[:3, : N_KV_HEADS * 32]
    write(at.rooms[0][0], Chunk(0, 0, 3), rows, -rows)
    kv.begin(Layers(0, 1), Step((), (fork(1, 0, 2),)))
    copy, source = room(kv, 1), room(kv, 0)
    np.testing.assert_array_equal(copy.v[:, :2], source.v[:, :2])
    assert copy.length == 2


GOOD = open_(2)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (Step((), (GOOD, move(0, 0, -1))), "positions can be copied"),
        (Step((), (GOOD, open_(0))), "open already"),
        (Step((), (GOOD, open_(9, 0))), "room for one position"),
        (Step((), (GOOD, fork(0, 1, 1))), "open already"),
        (Step((), (GOOD, fork(9, 8, 1))), "source is unknown"),
        (Step((), (GOOD, fork(9, 0, 5))), "only 4 positions"),
        (Step((), (GOOD, fork(9, 0, -1))), "positions can be copied"),
        (Step((), (GOOD, fork(9, 0, 4, capacity=3))), "only 3 positions"),
        (Step((), (GOOD, move(9, 8, 1))), "source is unknown"),
        (Step((), (GOOD, move(8, 8, 1))), "unknown or open"),
        (Step((), (GOOD, move(2, 0, 1))), "open already"),
        (Step((), (GOOD, move(9, 0, 5))), "only 4 positions"),
        (Step((), (GOOD, move(0, 0, 4, capacity=3))), "only 3 positions"),
        (Step((), (GOOD, move(9, 0, 4), move(0, 0, 1))), "unknown"),
        (Step((), (GOOD, drop(0), move(0, 0, 1))), "unknown"),
        (Step((Chunk(9, 0, 1),), (GOOD,)), "not open"),
        (Step((Chunk(0, 4, 1),), (GOOD, drop(0))), "not open"),
        (Step((Chunk(0, 5, 1),), (GOOD,)), "leaves a gap: 4 positions"),
        (Step((Chunk(0, 3, 1),), (GOOD, move(0, 0, 2))), "leaves a gap: 2 positions"),
        (Step((Chunk(0, 4, 5),), (GOOD,)), "does not fit the sequence's 8 positions"),
        (Step((Chunk(0, 4, 2), Chunk(0, 6, 3)), (GOOD,)), "does not fit"),
        (Step((Chunk(0, -1, 2),), (GOOD,)), "does not fit"),
        (Step((Chunk(0, 4, 0),), (GOOD,)), "does not fit"),
    ],
)
def test_a_step_that_cannot_be_is_refused_and_changes_nothing(step: Step, complaint: str) -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 4), 1, open_(0))
    with pytest.raises(FrameError, match=complaint):
        kv.begin(ALL, step)
    assert lengths(kv) == {0: 4}
    fill(kv, Chunk(0, 4, 1), 2)


def test_a_layer_that_missed_a_step_is_noticed_before_any_layer_changes() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 2), 1, open_(0))
    fill(kv, Chunk(0, 2, 1), 1, layers=Layers(0, 2))
    with pytest.raises(FrameError, match="leaves a gap: 2 positions"):
        kv.begin(ALL, Step((Chunk(0, 3, 1),), (open_(1),)))
    assert lengths(kv) == {0: 3}


@pytest.mark.parametrize("capacity", [1 << 45, 1 << 62])
def test_a_wild_capacity_is_an_error_that_changes_nothing(capacity: int) -> None:
    kv = cache()
    with pytest.raises(DeviceMemoryError, match=str(capacity)):
        kv.begin(ALL, Step((), (open_(0), open_(1, capacity))))
    assert lengths(kv) == {}
    kv.begin(ALL, Step((), (open_(0),)))
    with pytest.raises(DeviceMemoryError, match=str(capacity)):
        kv.begin(ALL, Step((), (move(2, 0, 0), move(1, 2, 0, capacity))))
    assert lengths(kv) == {0: 0}
    kv.begin(ALL, Step((), (drop(0),)))
    kv.begin(ALL, Step((), (replace(open_(0), capacity=3),)))
