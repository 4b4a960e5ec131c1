from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu_weights import LLAMA_TINY, SMALL_BLOCKS, mixed, random_weight
from prima_core.arch.families import open_model
from prima_core.arch.llama import llama_shapes
from prima_core.arch.shard import FloatArray
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import KvKind, KvOp, KvType, Layers, Slice, Step, Store
from prima_core.model.quant import GGUFType
from prima_core.model.spec import Experts
from prima_core.testing.driving import joined, logits_of_all, opened, step_of
from prima_core.testing.streaming import PoisonedStore
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from prima_torch import graphs
from prima_torch import kv as kv_module
from prima_torch.cuda_ops import CudaOps
from prima_torch.graphs import Recorder, Recording
from prima_torch.kv import SHORTEST, Pass
from prima_torch.shard import BATCHES, TorchShard
from tests.arch.small import ArrayStore, SmallModel, small_model, small_spec
from tests.prima_torch.recording import CountingRecorder, FailingRecorder, StaticOps

CPU = torch.device("cpu")
MODEL = small_model(small_spec(n_layers=2))
ALL = Layers(0, 2)


def whole(model: SmallModel = MODEL, kv_tokens: int = 2048, kv_type: KvType = KvType.F32) -> Slice:
    layers = (Layers(0, model.spec.n_layers),)
    return Slice(layers, has_input=True, has_output=True, kv_type=kv_type, kv_tokens=kv_tokens)


def shard_of(recorder: Recorder | None, part: Slice | None = None, store: Store | None = None) -> TorchShard:
    return TorchShard(StaticOps(CPU), MODEL.spec, part or whole(), store or MODEL.store(), recorder)


def decode(*places: tuple[int, int]) -> Step:
    """A token for each (sequence, position)."""
    return joined(*(step_of(sequence, [(7 * sequence + position) % 50], position) for sequence, position in places))


def run(shard: TorchShard, step: Step, layers: Layers = ALL, model: SmallModel = MODEL) -> FloatArray:
    return shard.run(layers, model.shared["token_embd.weight"][list(step.tokens)], step)


def assert_alike(a: FloatArray, b: FloatArray) -> None:
    """Torch's products differ in the last bits with where their operands lie."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def prefill(shard: TorchShard, sequence: int, n: int, capacity: int = 64) -> None:
    run(shard, step_of(sequence, [i % 50 for i in range(n)], kv=[opened(sequence, capacity)]))


def life_of_sequences() -> Iterator[Step]:
    """They open, grow over the end of a bucket, fork, are cut and dropped; each batch size, and prefill between."""
    yield step_of(0, [1, 2, 3], kv=[opened(0)])
    yield decode((0, 3))
    yield step_of(1, [i % 50 for i in range(254)], kv=[opened(1, 300)])
    for i in range(4):
        yield decode((1, 254 + i), (0, 4 + i))
    yield step_of(2, [9] * 5, kv=[opened(2)])
    yield decode((2, 5), (0, 8), (1, 258))
    yield replace(decode((3, 8), (2, 6)), kv=(KvOp(KvKind.FORK, 3, length=8, capacity=64, source=0),))
    yield replace(decode((1, 40), (3, 9)), kv=(KvOp(KvKind.MOVE, 1, 40, 300, source=1), KvOp(KvKind.DROP, 0)))
    yield replace(decode((0, 0), (1, 41), (2, 7), (3, 10)), kv=(opened(0),))
    yield replace(decode((3, 11)), kv=(KvOp(KvKind.MOVE, 3, length=11, capacity=100, source=3),))


class Forgetful(TorchShard):
    """What a step came with is gone when the next one comes."""

    def forward(self, layers: Layers, activation: FloatArray, step: Step, kv: Pass) -> FloatArray:
        answer = super().forward(layers, activation, step, kv)
        activation.fill(np.nan)
        for rows in kv.rows.values():
            rows.slots.fill(1 << 40)
            rows.lengths.fill(1 << 30)
        return answer


@pytest.mark.parametrize("kv_type", KvType)
def test_replayed_steps_answer_as_eager_ones_while_sequences_come_and_go(kv_type: KvType) -> None:
    model = small_model(small_spec(n_layers=2, head_dim=32))
    part, recorder = whole(model, kv_type=kv_type), CountingRecorder()
    recorded = Forgetful(StaticOps(CPU), model.spec, part, model.store(), recorder)
    eager = TorchShard(StaticOps(CPU), model.spec, part, model.store())
    for step in life_of_sequences():
        assert_alike(run(recorded, step, model=model), run(eager, step, model=model))
    assert (recorder.made, recorder.replayed) == (5, 10)


class LettingGo:
    """As CUDA graphs do, its recordings hold nothing that they read or write."""

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        return Recording(run(), lambda: None)


def test_batches_are_filled_up_so_that_few_sizes_are_recorded() -> None:
    shard = shard_of(recorder := CountingRecorder())
    for sequence in range(8):
        prefill(shard, sequence, 2)
    for n in range(1, 9):
        run(shard, decode(*((sequence, 2) for sequence in range(n))))
    assert (recorder.made, recorder.replayed) == (len(BATCHES), 8)


def test_longer_sequences_are_recorded_for_twice_the_length() -> None:
    shard = shard_of(recorder := CountingRecorder())
    prefill(shard, 0, SHORTEST - 2, capacity=2 * SHORTEST)
    made = []
    for position in range(SHORTEST - 2, SHORTEST + 2):
        run(shard, decode((0, position)))
        made.append(recorder.made)
    assert made == [1, 1, 2, 2]


def test_prefill_and_large_batches_are_not_recorded() -> None:
    shard = shard_of(recorder := CountingRecorder())
    for sequence in range(9):
        prefill(shard, sequence, 2)
    run(shard, decode(*((sequence, 2) for sequence in range(9))))
    run(shard, step_of(0, [1, 2], 3))
    assert recorder.made == 0


def test_each_visit_has_recordings_of_its_own() -> None:
    visits = Layers(0, 1), Layers(1, 2)
    part = replace(whole(), layers=visits)
    shard, eager = shard_of(recorder := CountingRecorder(), part), shard_of(None, part)
    for step in (step_of(0, [1, 2], kv=[opened(0)]), decode((0, 2)), decode((0, 3))):
        for layers in visits:
            assert_alike(run(shard, step, layers), run(eager, step, layers))
    assert (recorder.made, recorder.replayed) == (2, 4)


def test_an_answer_stays_when_the_next_step_is_replayed() -> None:
    shard = shard_of(CountingRecorder())
    prefill(shard, 0, 2)
    activation = np.ones((1, MODEL.spec.d_model), np.float32)
    first = shard.run(ALL, activation, decode((0, 2)))
    kept = first.copy()
    shard.run(ALL, 2 * activation, decode((0, 3)))
    np.testing.assert_array_equal(first, kept)


def test_recordings_are_let_go_when_kv_moves() -> None:
    shard, eager = shard_of(recorder := CountingRecorder(), whole(kv_tokens=0)), shard_of(None)
    for s in (shard, eager):
        prefill(s, 0, 2)
    assert_alike(run(shard, decode((0, 2))), run(eager, decode((0, 2))))
    assert recorder.alive == 1
    for s in (shard, eager):
        prefill(s, 1, 2, capacity=4096)  # more pages than there are
    assert recorder.alive == 0
    assert_alike(run(shard, decode((0, 3), (1, 2))), run(eager, decode((0, 3), (1, 2))))
    assert recorder.made == 2


def test_kv_that_grows_is_not_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each layer in turn, what it had goes before the next one gets more."""
    shard = shard_of(LettingGo(), whole(kv_tokens=0))
    prefill(shard, 0, 2)
    run(shard, decode((0, 2)))
    moved: list[weakref.ref[torch.Tensor]] = []
    twice: list[int] = []
    enlarged = kv_module._enlarged

    def counted(pages: torch.Tensor, n_pages: int) -> torch.Tensor:
        moved.append(weakref.ref(pages))
        twice.append(sum(old() is not None for old in moved))
        return enlarged(pages, n_pages)

    monkeypatch.setattr(kv_module, "_enlarged", counted)
    prefill(shard, 1, 2, capacity=4096)
    assert twice == [1, 2] * 2  # K and V of a layer


def test_a_pass_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    shard = shard_of(None)
    monkeypatch.setattr(StaticOps, "linear", full)
    with pytest.raises(DeviceMemoryError, match="no memory for a pass of 2 rows on cpu"):
        prefill(shard, 0, 2)
    with pytest.raises(DeviceMemoryError, match="no memory for a pass of 1 rows on cpu"):
        shard.logits(np.ones((3, MODEL.spec.d_model), np.float32), [2])


def test_a_pass_without_memory_for_its_recording_is_computed_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    expected = shard_of(None).embed(step_of(0, [1]))
    monkeypatch.setattr(graphs, "Inputs", full)
    np.testing.assert_array_equal(shard_of(CountingRecorder()).embed(step_of(0, [1])), expected)


def test_layers_of_which_something_is_streamed_are_computed_as_they_come() -> None:
    """And are recorded again from the pass after the one in which all of them stays; what was recorded is let go."""
    store = PoisonedStore(MODEL.store(), lambda name: False)
    shard, eager = shard_of(recorder := CountingRecorder(), store=store), shard_of(None)
    for s in (shard, eager):
        prefill(s, 0, 2)
    counts = []
    for position, share in enumerate(["", "", "blk.1.ffn_up", "blk.", "", "", ""]):
        store.streams = lambda name, share=share: bool(share) and name.startswith(share)  # type: ignore[misc]
        assert_alike(run(shard, decode((0, 2 + position))), run(eager, decode((0, 2 + position))))
        counts.append((recorder.made, recorder.replayed, recorder.alive))
    assert counts == [(1, 1, 1), (1, 2, 1), (1, 2, 0), (1, 2, 0), (1, 2, 0), (2, 3, 1), (2, 4, 1)]
    assert not store.held


def test_ends_that_are_streamed_for_a_while_are_recorded_anew() -> None:
    store = PoisonedStore(MODEL.store(), lambda name: False)
    shard, eager = shard_of(recorder := CountingRecorder(), store=store), shard_of(None)
    made = []
    for start, is_streamed in enumerate([False, True, False, False]):
        store.streams = lambda name, streamed=is_streamed: streamed  # type: ignore[misc]
        step = step_of(0, [7 + start], start, kv=[opened(0)] if start == 0 else [])
        x = shard.embed(step)
        np.testing.assert_array_equal(x, eager.embed(step))
        assert_alike(shard.logits(x, [0]), eager.logits(x, [0]))
        made.append(recorder.made)
    assert made == [2, 2, 4, 4]
    assert recorder.alive == 2


def test_recordings_are_bounded_and_the_longest_unused_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_RECORDINGS", 2)
    shard = shard_of(recorder := CountingRecorder())
    for sequence in range(4):
        prefill(shard, sequence, 2)
    for n in (1, 2, 1, 4, 1):  # the fourth takes the place of the second
        run(shard, decode(*((sequence, 2) for sequence in range(n))))
    assert (recorder.made, recorder.alive) == (3, 2)


def test_a_closed_shard_lets_its_recordings_go() -> None:
    shard = shard_of(recorder := CountingRecorder())
    prefill(shard, 0, 2)
    run(shard, decode((0, 2)))
    shard.close()
    assert recorder.alive == 0


def test_a_pass_that_cannot_be_recorded_is_computed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    shard, eager = shard_of(FailingRecorder()), shard_of(None)
    with caplog.at_level(logging.WARNING):
        for step in (step_of(0, [1, 2], kv=[opened(0)]), decode((0, 2)), decode((0, 3))):
            np.testing.assert_array_equal(run(shard, step), run(eager, step))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the layers of decode steps cannot be recorded, which makes them slower"
    ]
    assert "stream is capturing" in caplog.text


def test_embeddings_and_logits_of_few_tokens_are_replayed_too() -> None:
    shard, eager = shard_of(recorder := CountingRecorder()), shard_of(None)
    for n in (3, 4, 2, 9):
        step = step_of(n, list(range(n)), kv=[opened(n)])
        assert_alike(logits_of_all([(shard, ALL)], step), logits_of_all([(eager, ALL)], step))
    assert (recorder.made, recorder.replayed) == (4, 6)


def test_a_model_of_two_ropes_is_replayed(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "gemma.gguf", TinyModel(arch="gemma3", window=4, rope_local_theta=100.0))
    with open_model(path) as model:
        part, layers = Slice((Layers(0, 2),), has_input=True, has_output=True), Layers(0, 2)
        shards = [TorchShard(StaticOps(CPU), model.spec, part, model.store(), r) for r in (CountingRecorder(), None)]
        for step in (step_of(0, [1, 2, 3, 4, 5], kv=[opened(0)]), step_of(0, [6], 5), step_of(0, [7], 6)):
            replayed, eager = (logits_of_all([(shard, layers)], step) for shard in shards)
            np.testing.assert_allclose(replayed, eager, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_a_decode_step_can_be_recorded() -> None:
    """Mixtures included, whose experts are chosen on the device; the interpreter runs what a GPU would."""
    spec = replace(LLAMA_TINY, experts=Experts(2, 1, 8))
    store = ArrayStore(SmallModel(spec, {}, ()))
    store.shared_weights = dict(mixed(LLAMA_TINY, SMALL_BLOCKS).ends)
    store.layers = [{name: random_weight(GGUFType.F32, shape, name) for name, shape in llama_shapes(spec).items()}]
    layers, x = Layers(0, 1), np.ones((1, 8), np.float32)
    shard, eager = (
        TorchShard(CudaOps(CPU), spec, Slice((layers,), has_output=True), store, r) for r in (CountingRecorder(), None)
    )
    for step in (step_of(0, [1], kv=[opened(0)]), step_of(0, [1], 1)):
        replayed, computed = (s.run(layers, x, step) for s in (shard, eager))
        np.testing.assert_array_equal(replayed, computed)
        np.testing.assert_array_equal(shard.logits(computed, [0]), eager.logits(computed, [0]))


def test_a_recorded_pass_acquires_each_layer_once_and_one_that_cannot_be_too() -> None:
    """A store that streams reads ahead in this order; to ask for a layer before its turn would throw that away."""
    for share in ("nothing", "blk.1."):
        store = PoisonedStore(MODEL.store(), lambda name, share=share: name.startswith(share))  # type: ignore[misc]
        shard = shard_of(CountingRecorder(), store=store)
        prefill(shard, 0, 2)
        store.acquired.clear()
        run(shard, decode((0, 2)))
        run(shard, decode((0, 3)))
        assert store.acquired[-2:] == [0, 1]
        if share == "blk.1.":
            assert store.acquired == [0, 1, 0, 1]
