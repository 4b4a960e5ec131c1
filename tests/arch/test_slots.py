"""Shards over stores that stream: what a device holds, when it comes there, and that nothing stale is used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch import slots
from prima_core.arch.blocks import CopiedBlocks
from prima_core.arch.shard import OpsShard
from prima_core.arch.slots import SlotOps, pieces
from prima_core.interfaces import ExpertGroup, Layers, Slice, Weight
from prima_core.memory.residency import PIECE_BYTES
from prima_core.model.names import OUTPUT, TOKEN_EMBD
from prima_core.model.quant import GGUFType
from prima_core.testing.driving import FloatArray, logits_of_all, opened, step_of
from prima_core.testing.streaming import PoisonedStore
from prima_numpy.ops import Matrix, ReferenceOps, exact_product
from tests.arch.small import SmallModel, small_model, small_spec

ALL = Layers(0, 3)
MODEL = small_model(small_spec(n_layers=3))
WHOLE = Slice((ALL,), has_input=True, has_output=True)
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def nothing(name: str) -> bool:
    return False


def everything(name: str) -> bool:
    return True


def gate_and_up(name: str) -> bool:
    """Two of a shape in each layer."""
    return "ffn_gate" in name or "ffn_up" in name


class Uploading(ReferenceOps):
    """A device: it has copies, and keeps count of them. `most_streamed`: of the copies that were there at once, the
    most of streamed tensors."""

    copies = True

    def __init__(self, log: list[str]) -> None:
        super().__init__(exact_product)
        self.log = log
        self.uploads: list[str] = []
        self.made: list[tuple[str, weakref.ref[NDArray[np.uint8]]]] = []

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        self.uploads.append(weight.name)
        held = super().matrix(replace(weight, data=weight.data.copy()), bias)
        self.made.append((weight.name, weakref.ref(held.weight.data)))
        return held

    def linear(self, x: FloatArray, matrix: Matrix) -> FloatArray:
        self.log.append(f"compute {matrix.weight.name}")
        return super().linear(x, matrix)

    def alive(self, streams: Callable[[str], bool]) -> int:
        return sum(data() is not None for name, data in self.made if streams(name))


class Refilling(Uploading):
    """A device whose matrices can be written to."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(log)
        self.refills: list[str] = []

    def refill(self, slot: Matrix, weight: Weight, bias: Weight | None = None) -> Matrix:
        self.refills.append(weight.name)
        assert (slot.weight.type, slot.weight.shape) == (weight.type, weight.shape)
        slot.weight.data[...] = weight.data
        return Matrix(replace(weight, data=slot.weight.data), None if bias is None else self.vector(bias))

    def settle(self, x: FloatArray) -> FloatArray:
        return x


class LoggingStore(PoisonedStore):
    log: list[str]

    def release(self, layer: int) -> None:
        super().release(layer)
        self.log.append(f"release {layer}")


def loaded(
    kind: type[Uploading], streams: Callable[[str], bool], model: SmallModel = MODEL, part: Slice = WHOLE
) -> tuple[OpsShard[FloatArray, Matrix, object], Uploading, LoggingStore]:
    store = LoggingStore(model.store(), streams)
    store.log = []
    ops = kind(store.log)
    return OpsShard(ops, model.spec, part, store), ops, store  # type: ignore[arg-type]  # its passes are its own


def texts(shard: OpsShard[FloatArray, Matrix, object], sequence: int = 0) -> Iterator[FloatArray]:
    for start, ids in ((0, [3, 1, 4, 1]), (4, [5]), (5, [9])):
        yield logits_of_all([(shard, ALL)], step_of(sequence, ids, start, kv=[opened(sequence)] if not start else []))


def expected(model: SmallModel = MODEL) -> FloatArray:
    ops = ReferenceOps(exact_product)
    return np.concatenate(list(texts(OpsShard(ops, model.spec, WHOLE, model.store()))))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Uploading, Refilling])
@pytest.mark.parametrize("streams", [nothing, gate_and_up, everything])
@pytest.mark.parametrize("model", [MODEL, small_model(small_spec("qwen2", n_layers=3, tied_output=True))])
def test_a_device_that_streams_says_what_one_says_that_holds_all(
    kind: type[Uploading], streams: Callable[[str], bool], model: SmallModel
) -> None:
    shard, _, store = loaded(kind, streams, model)
    np.testing.assert_array_equal(np.concatenate(list(texts(shard))), expected(model))
    assert not store.held


def test_what_stays_is_uploaded_once_and_what_is_streamed_takes_turns_in_slots() -> None:
    shard, ops, _ = loaded(Refilling, gate_and_up)
    of_first_layer = [f"blk.0.{name}.weight" for name in MATRICES]
    kept = [f"blk.{layer}.{name}.weight" for layer in (1, 2) for name in MATRICES if not gate_and_up(name)]
    assert sorted(ops.uploads) == sorted([*of_first_layer, *kept, TOKEN_EMBD, OUTPUT])
    after_load = len(ops.uploads)
    list(texts(shard))
    assert len(ops.uploads) == after_load
    assert isinstance(ops, Refilling)
    assert ops.refills == 3 * [f"blk.{layer}.ffn_{name}.weight" for layer in range(3) for name in ("gate", "up")]


def test_where_slots_cannot_be_refilled_the_old_matrix_goes_before_the_new_one_comes() -> None:
    shard, ops, _ = loaded(Uploading, gate_and_up)
    most = 0
    make = ops.matrix

    def counted(weight: Weight, bias: Weight | None = None) -> Matrix:
        nonlocal most
        held = make(weight, bias)
        most = max(most, ops.alive(gate_and_up))
        return held

    ops.matrix = counted  # type: ignore[method-assign]  # a spy
    list(texts(shard))
    assert most == 2
    assert sum(map(gate_and_up, ops.uploads)) == 2 + 3 * 3 * 2


def test_where_ops_are_their_own_judges_of_order_the_activation_stays_on_the_device() -> None:
    trips: list[bool] = []

    class Counting(Refilling):
        def to_host(self, x: FloatArray) -> FloatArray:
            trips.append(True)
            return super().to_host(x)

    shard, _, _ = loaded(Counting, gate_and_up)
    next(texts(shard))
    assert len(trips) == 3  # embeddings, layers, logits
    assert isinstance(Counting([]), SlotOps)


def test_nothing_that_is_streamed_is_read_to_load() -> None:
    read: list[str] = []

    class Watching(Refilling):
        def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
            if weight.data.any():
                read.append(weight.name)
            return super().matrix(weight, bias)

    loaded(Watching, gate_and_up)
    assert not any(map(gate_and_up, read))
    assert "blk.0.ffn_down.weight" in read


def test_each_layer_is_acquired_once_in_a_pass() -> None:
    for streams in (nothing, gate_and_up, lambda name: name.startswith("blk.1.")):
        shard, _, store = loaded(Refilling, streams)
        store.acquired.clear()
        next(texts(shard))
        assert store.acquired == [0, 1, 2]


def test_a_layer_is_released_as_soon_as_it_is_copied() -> None:
    shard, _, store = loaded(Refilling, gate_and_up)
    store.log.clear()
    next(texts(shard))
    assert store.log.index("release 1") < store.log.index("compute blk.1.attn_q.weight")


def test_a_store_that_gives_way_and_recovers_is_followed() -> None:
    shard, ops, store = loaded(Refilling, nothing)
    rows = []
    for row, streams in zip(texts(shard), (gate_and_up, everything, nothing), strict=True):
        rows.append(row)
        store.streams = streams
    np.testing.assert_array_equal(np.concatenate(rows), expected())
    assert ops.alive(everything) == 7 + 2  # slots for a layer, and for 24 and 2 rows of the output
    store.given_back.clear()
    next(texts(shard, sequence=1))
    assert sorted({name for name in store.given_back if name.startswith("blk.1.")}) == sorted(
        f"blk.1.{name}.weight" for name in MATRICES
    )


def test_a_copy_goes_when_its_tensor_is_streamed() -> None:
    shard, ops, store = loaded(Refilling, nothing)
    assert ops.alive(gate_and_up) == 6
    store.streams = gate_and_up
    next(texts(shard))
    assert ops.alive(gate_and_up) == 2


def test_only_what_stays_is_given_back() -> None:
    _, _, store = loaded(Refilling, gate_and_up)
    assert not any(map(gate_and_up, store.given_back))
    assert "blk.2.ffn_down.weight" in store.given_back
    assert "blk.2.ffn_norm.weight" in store.given_back


@pytest.mark.parametrize("kind", [ReferenceOps, Refilling])
def test_a_streamed_output_goes_by_in_runs_of_rows(kind: type[ReferenceOps], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PIECE_BYTES", 10 * 24 * 4)  # rows
    store = PoisonedStore(MODEL.store(), lambda name: name == OUTPUT, rows_of_block=24)
    ops = Refilling([]) if kind is Refilling else ReferenceOps(exact_product)
    shard = OpsShard(ops, MODEL.spec, WHOLE, store)
    rows = np.concatenate(list(texts(shard)))  # type: ignore[arg-type]
    np.testing.assert_allclose(rows, expected(), rtol=1e-5, atol=1e-6)  # BLAS adds up by shape
    if isinstance(ops, Refilling):
        assert ops.uploads.count(OUTPUT) == 3  # of 10, 4 and, at the end, 2 rows


def test_of_a_streamed_table_only_the_rows_of_the_tokens_are_read() -> None:
    shard, ops, _ = loaded(Refilling, lambda name: name == TOKEN_EMBD)
    ops.uploads.clear()
    seen: list[tuple[int, ...]] = []
    make = ops.matrix
    ops.matrix = lambda weight, bias=None: (seen.append(weight.shape), make(weight, bias))[1]  # type: ignore
    shard.embed(step_of(0, [7, 7, 2]))
    assert seen == [(3, 24)]


def test_a_stack_of_experts_is_complete_on_a_device() -> None:
    """Its store brings them in groups, and between groups another's bytes are there."""
    values = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    buffer = np.full(3 * values[0].nbytes, 0xFF, np.uint8)

    def require(chosen: NDArray[np.intp]) -> Iterator[ExpertGroup]:
        for group in np.array_split(np.unique(chosen), 2):
            view, places = buffer.view(np.float32).reshape(3, 2, 3), np.arange(len(group))[::-1]
            view[places] = values[group]
            yield group, places
            view[places] = np.nan

    stack = Weight("blk.0.ffn_gate_exps.weight", GGUFType.F32, values.shape, buffer, require, places=3)
    store = PoisonedStore(MODEL.store(), nothing)
    held: list[Matrix] = []

    def bind(binder, layer, weights):  # type: ignore[no-untyped-def]  # stands for a family
        held.append(binder.matrix(stack))

    CopiedBlocks(Refilling([]), bind, store).load(0)
    np.testing.assert_array_equal(held[0].weight.data, values.reshape(-1).view(np.uint8))


def test_a_matrix_is_cut_into_pieces_of_whole_rows() -> None:
    rows = PIECE_BYTES // 8 // 4
    matrix = Weight("output.weight", GGUFType.F32, (2 * rows + 1, 8), np.zeros((2 * rows + 1) * 32, np.uint8))
    assert [piece.shape for piece in pieces(matrix)] == [(rows, 8), (rows, 8), (1, 8)]
    wide = Weight("output.weight", GGUFType.F32, (2, 3 * rows * 8), np.zeros(2 * 3 * rows * 32, np.uint8))
    assert [piece.shape[0] for piece in pieces(wide)] == [1, 1]
