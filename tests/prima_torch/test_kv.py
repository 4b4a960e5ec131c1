from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prima_core.errors import DeviceMemoryError, FrameError, ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_numpy import kv as numpy_kv
from prima_torch import kv as kv_module
from prima_torch.kv import PAGE, SLACK_PAGES, Pass, TorchKv, read, write

FloatArray = NDArray[np.float32]
CPU = torch.device("cpu")
ALL = Layers(0, 3)
N_KV_HEADS, HEAD_DIM = 2, 32
WIDTH = N_KV_HEADS * HEAD_DIM


def cache(type: KvType = KvType.F32, kv_tokens: int = 0, layers: tuple[Layers, ...] = (ALL,)) -> TorchKv:
    return TorchKv(Slice(layers, kv_type=type, kv_tokens=kv_tokens), N_KV_HEADS, HEAD_DIM, CPU)


def open_(sequence: int, capacity: int = 100) -> KvOp:
    return KvOp(KvKind.OPEN, sequence, capacity=capacity)


def fork(sequence: int, source: int, length: int, capacity: int = 100) -> KvOp:
    return KvOp(KvKind.FORK, sequence, length, capacity, source)


def move(sequence: int, source: int, length: int, capacity: int = 100) -> KvOp:
    return KvOp(KvKind.MOVE, sequence, length, capacity, source)


def drop(sequence: int) -> KvOp:
    return KvOp(KvKind.DROP, sequence)


def fill(kv: TorchKv, chunk: Chunk, value: float, *operations: KvOp, layers: Layers = ALL) -> Pass:
    """Write value + 100 * position + 1000 * layer as K, and its negative as V."""
    at = kv.begin(layers, Step((chunk,), operations))
    positions = torch.arange(chunk.start, chunk.start + chunk.count)
    for layer in layers:
        rows = (value + 100 * positions + 1000 * layer)[:, None].expand(-1, WIDTH).to(torch.float32)
        write(at.pages[layer].k, at.inputs(layer).slots, rows)
        write(at.pages[layer].v, at.inputs(layer).slots, -rows)
    return at


def seen(at: Pass, layer: int = 0, i: int = 0) -> list[float]:
    """What the i-th chunk of a pass may see: the values that were filled in, without those of position and layer."""
    inputs, pages = at.inputs(layer), at.pages[layer]
    keys, values = (read(half, inputs.table[i])[: int(inputs.lengths[i])] for half in (pages.k, pages.v))
    assert torch.equal(values, -keys)
    assert torch.equal(keys, keys[:, :1, :1].expand_as(keys))
    return [float(key) - 100 * n - 1000 * layer for n, key in enumerate(keys[:, 0, 0])]


def test_positions_stay_over_pages_and_growth() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 70), 1, open_(0, capacity=200))
    fill(kv, Chunk(1, 0, 10), 2, open_(1, capacity=1000))
    at = fill(kv, Chunk(0, 70, 80), 3)
    assert [seen(at, layer) for layer in ALL] == [[1] * 70 + [3] * 80] * 3
    assert seen(fill(kv, Chunk(1, 10, 1), 4)) == [2] * 10 + [4]


def test_rewritten_positions_forget_what_stood_after_them() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    assert seen(fill(kv, Chunk(0, 2, 1), 9)) == [1, 1, 9]
    with pytest.raises(FrameError, match="leaves a gap: 3 positions"):
        kv.begin(ALL, Step((Chunk(0, 5, 1),)))


def test_fork_copies_and_then_lives_alone() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 80), 1, open_(0))
    assert seen(fill(kv, Chunk(1, 70, 1), 9, fork(1, 0, length=70)), layer=2) == [1] * 70 + [9]
    assert seen(fill(kv, Chunk(0, 80, 1), 5), layer=2) == [1] * 80 + [5]


@pytest.mark.parametrize("capacity", [100, 72, 300], ids=["as large", "smaller", "larger"])
def test_what_is_moved_is_the_same_under_another_number(capacity: int) -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 80), 1, open_(0))
    assert seen(fill(kv, Chunk(1, 70, 1), 9, move(1, 0, length=70, capacity=capacity)), layer=1) == [1] * 70 + [9]
    with pytest.raises(FrameError, match="not open"):
        kv.begin(ALL, Step((Chunk(0, 0, 1),)))
    with pytest.raises(FrameError, match=f"does not fit the sequence's {capacity} positions"):
        kv.begin(ALL, Step((Chunk(1, 71, capacity),)))


def test_operations_of_a_step_may_build_on_each_other_and_on_pages_just_given_back() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 80), 1, open_(0, capacity=128))
    n_bytes = kv.n_bytes
    operations = fork(1, 0, 65, 65), drop(0), fork(2, 1, 64, 64), drop(1), fork(3, 2, 10, 10), open_(4, 64)
    at = kv.begin(ALL, Step((Chunk(2, 63, 1), Chunk(3, 9, 1)), operations))
    assert [seen(at, 1, i)[:-1] for i in range(2)] == [[1] * 63, [1] * 9]
    assert kv.n_bytes <= n_bytes * 2


def test_dropped_pages_and_those_behind_a_shorter_end_are_used_again() -> None:
    kv = cache(kv_tokens=PAGE)
    n_bytes = kv.n_bytes
    for sequence in range(50):
        fill(kv, Chunk(sequence, 0, 100), sequence, open_(sequence))
        fill(kv, Chunk(sequence, 3, 1), 7, move(sequence, sequence, 3))
        kv.begin(ALL, Step((), (drop(sequence), drop(sequence))))
    assert kv.n_bytes == n_bytes


def test_room_for_the_plans_tokens_is_there_from_the_start() -> None:
    kv = cache(KvType.F16, kv_tokens=1000, layers=(Layers(0, 2), Layers(7, 8)))
    n_pages = -(-1000 // PAGE) + SLACK_PAGES
    assert kv.n_bytes == 3 * 2 * n_pages * PAGE * WIDTH * 2
    pages = kv.begin(Layers(7, 8), Step(())).pages[7]
    at = kv.begin(Layers(7, 8), Step((Chunk(0, 0, 1),), (open_(0, 1000),)))
    assert at.pages[7] is pages


@pytest.mark.parametrize(
    "step",
    [
        Step((Chunk(9, 0, 1),), (drop(0),)),
        Step((), (drop(0), move(9, 9, 1))),
        Step((), (move(1, 0, 3), fork(0, 7, 1))),
        Step((Chunk(0, 0, 101),), (move(0, 0, 1),)),
        Step((), (drop(0), open_(5, 0))),
        Step((Chunk(0, 5, 1),), (move(0, 0, 4),)),
    ],
    ids=lambda step: ",".join(op.kind for op in step.kv),
)
def test_a_refused_step_changes_nothing(step: Step) -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    with pytest.raises(FrameError):
        kv.begin(ALL, step)
    assert seen(fill(kv, Chunk(0, 6, 1), 2)) == [1] * 6 + [2]


@pytest.mark.parametrize("capacity", [1 << 40, 1 << 60])
def test_a_step_without_memory_for_it_changes_nothing(capacity: int) -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0))
    with pytest.raises(DeviceMemoryError, match="positions of KV in 3 layers on cpu"):
        kv.begin(ALL, Step((), (drop(0), open_(1), open_(2, capacity))))
    assert seen(fill(kv, Chunk(0, 6, 1), 2)) == [1] * 6 + [2]
    assert seen(fill(kv, Chunk(1, 0, 1), 3, open_(1))) == [3]


def test_a_fork_without_memory_for_its_copy_is_an_error_of_ours_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even what the same step drops, in whose place the copy would be."""
    kv = cache(layers=(Layers(0, 1), Layers(1, 3)))
    for layers in (Layers(0, 1), Layers(1, 3)):
        fill(kv, Chunk(0, 0, 6), 1, open_(0), layers=layers)
        fill(kv, Chunk(7, 0, 6), 7, open_(7), layers=layers)
    fill(kv, Chunk(0, 6, 1), 1, layers=Layers(0, 1))  # so that layers have not seen the same steps
    space, taken = kv_module._space, []

    def no_space(like: torch.Tensor, n_pages: int) -> torch.Tensor:
        taken.append(n_pages)
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return space(like, n_pages)

    with monkeypatch.context() as full:
        full.setattr(kv_module, "_space", no_space)
        with pytest.raises(DeviceMemoryError, match="a copy of KV on cpu"):
            kv.begin(ALL, Step((), (drop(7), fork(1, 0, 6))))
    assert len(taken) == 2
    assert seen(fill(kv, Chunk(7, 6, 1), 2)) == [7] * 6 + [2]
    assert seen(fill(kv, Chunk(1, 0, 1), 3, open_(1))) == [3], "there is no sequence 1 yet"
    assert seen(fill(kv, Chunk(0, 6, 1), 2)) == [1] * 6 + [2]


def test_a_long_fork_is_copied_some_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_module, "COPIED_PAGES", 2)
    kv = cache()
    fill(kv, Chunk(0, 0, 5 * PAGE - 3), 1, open_(0, 6 * PAGE))
    at = fill(kv, Chunk(1, 5 * PAGE - 3, 1), 2, fork(1, 0, 5 * PAGE - 3, 6 * PAGE))
    assert seen(at) == [1] * (5 * PAGE - 3) + [2]


def test_a_cache_on_a_full_device_grows_by_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter more would not fit."""
    kv = cache(kv_tokens=100 * PAGE)
    fill(kv, Chunk(0, 0, 6), 1, open_(0, (100 + SLACK_PAGES) * PAGE))
    n_bytes = kv.n_bytes

    def enlarged(pages: torch.Tensor, n_pages: int) -> torch.Tensor:
        if n_pages > 100 + SLACK_PAGES + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grown(pages, n_pages)

    grown = kv_module._enlarged
    monkeypatch.setattr(kv_module, "_enlarged", enlarged)
    fill(kv, Chunk(1, 0, 1), 2, open_(1, PAGE))
    assert kv.n_bytes == n_bytes // (100 + SLACK_PAGES) * (100 + SLACK_PAGES + 1)
    assert seen(fill(kv, Chunk(0, 6, 1), 3)) == [1] * 6 + [3]
    with pytest.raises(DeviceMemoryError):
        kv.begin(ALL, Step((), (open_(2, PAGE),)))


def test_layers_may_see_steps_at_different_times() -> None:
    kv = cache()
    first, rest = Layers(0, 1), Layers(1, 3)
    fill(kv, Chunk(0, 0, 6), 1, open_(0), layers=first)
    fill(kv, Chunk(1, 0, 6), 2, open_(1), layers=first)
    with pytest.raises(FrameError, match="not open"):
        kv.begin(ALL, Step((Chunk(0, 6, 1),)))
    fill(kv, Chunk(0, 0, 6), 1, open_(0), layers=rest)
    assert seen(fill(kv, Chunk(1, 0, 6), 2, open_(1), layers=rest), layer=2) == [2] * 6
    at = fill(kv, Chunk(0, 6, 1), 3)
    assert at.common_rows() is not None
    assert [seen(at, layer) for layer in ALL] == [[1] * 6 + [3]] * 3


def test_layers_with_other_pages_each_have_their_own_rows() -> None:
    kv = cache()
    fill(kv, Chunk(0, 0, 6), 1, open_(0), layers=Layers(0, 1))
    for layers in (Layers(0, 1), Layers(1, 3)):
        fill(kv, Chunk(1, 0, 6), 2, open_(1), layers=layers)
    at = fill(kv, Chunk(1, 6, 1), 3)
    assert at.common_rows() is None
    assert [seen(at, layer) for layer in ALL] == [[2] * 6 + [3]] * 3


def test_a_decode_step_is_rows_of_different_sequences() -> None:
    kv = cache()
    openings = open_(0), open_(1)
    assert not kv.begin(ALL, Step((Chunk(0, 0, 2), Chunk(1, 0, 1)), openings)).decodes
    assert kv.begin(ALL, Step((Chunk(0, 2, 1), Chunk(1, 1, 1)))).decodes
    assert not kv.begin(ALL, Step((Chunk(0, 3, 1), Chunk(0, 4, 1)))).decodes


def test_inputs_name_the_place_of_every_row() -> None:
    kv = cache()
    fill(kv, Chunk(3, 0, 1), 1, open_(3, 64))
    at = kv.begin(ALL, Step((Chunk(4, 0, 66), Chunk(3, 1, 1)), (open_(4, 300),)))
    inputs = at.inputs(0)
    assert at.longest == 256
    assert inputs.table.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
    assert inputs.lengths.tolist() == [66, 2]
    assert inputs.slots.tolist() == [*range(64, 130), 1]
    assert at.inputs(1) is inputs


def test_given_inputs_are_read_in_place_of_the_pass_own() -> None:
    kv = cache()
    at = fill(kv, Chunk(0, 0, 1), 1, open_(0))
    slots, table, lengths = torch.tensor([5]), torch.tensor([[0]]), torch.tensor([6])
    given = at.with_inputs(slots, table, lengths, 64)
    assert (given.inputs(2).slots, given.inputs(0).table, given.longest) == (slots, table, 64)
    assert given.pages is at.pages


@pytest.mark.parametrize("type", KvType)
def test_every_type_keeps_what_numpy_keeps(type: KvType) -> None:
    rows = np.random.default_rng(1).standard_normal((70, WIDTH), np.float32)
    rows[3, 5], rows[4, 40], rows[5, :32] = np.inf, np.nan, 1e-31
    rows[6, 0] = 7e4  # too large for f16
    chunk = Chunk(0, 0, 70)
    at = cache(type).begin(ALL, Step((chunk,), (open_(0),)))
    write(at.pages[0].k, at.inputs(0).slots, torch.from_numpy(rows))
    twin = numpy_kv.NumpyKv([ALL], N_KV_HEADS, HEAD_DIM, type).begin(ALL, Step((chunk,), (open_(0),)))
    numpy_kv.write(twin.rooms[0][0], chunk, rows, rows)
    expected = numpy_kv.read(twin.rooms[0][0].k, slice(70))
    kept = read(at.pages[0].k, at.inputs(0).table[0])[:70].transpose(0, 1)
    np.testing.assert_array_equal(kept.numpy(), expected)


def test_heads_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="heads of 48"):
        TorchKv(Slice((ALL,), kv_type=KvType.Q8_0), 2, 48, CPU)


def test_a_closed_cache_has_nothing() -> None:
    kv = cache(kv_tokens=100)
    kv.close()
    kv.close()
    assert kv.n_bytes == 0
