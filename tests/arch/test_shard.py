from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from prima_core.arch.shard import OpsShard
from prima_core.errors import FrameError, PlanError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Shard, Slice, Step, Weight
from prima_core.model.names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from prima_core.testing.driving import FloatArray, Visit, chunked, logits_of_all, opened, pass_through, step_of
from prima_numpy.ops import ReferenceOps, exact_product
from tests.arch.small import ArrayStore, SmallModel, small_model, small_spec

IDS = list(np.random.default_rng(1).integers(0, 50, 13))
MODEL = small_model(small_spec(n_layers=6))


def shard(
    *ranges: Layers, has_input: bool = False, has_output: bool = False, model: SmallModel = MODEL,
    store: ArrayStore | None = None,
) -> Shard:  # fmt: skip
    ops = ReferenceOps(exact_product, KvType.F32)
    return OpsShard(ops, model.spec, Slice(ranges, has_input, has_output), store or model.store())


def whole(model: SmallModel = MODEL, store: ArrayStore | None = None) -> Shard:
    return shard(Layers(0, model.spec.n_layers), has_input=True, has_output=True, model=model, store=store)


def run_in_steps(visits: Sequence[Visit]) -> FloatArray:
    return np.concatenate([logits_of_all(visits, step) for step in chunked(0, IDS, 5)])


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_any_split_into_shards_gives_the_same_bits(cuts: tuple[int, ...]) -> None:
    ranges = [Layers(start, stop) for start, stop in pairwise(cuts)]
    visits = [
        (shard(part, has_input=part == ranges[0], has_output=part == ranges[-1]), part) for part in ranges
    ]  # fmt: skip
    expected = run_in_steps([(whole(), Layers(0, 6))])
    np.testing.assert_array_equal(run_in_steps(visits), expected)


def test_a_shard_that_is_visited_twice_gives_the_same_bits() -> None:
    first = shard(Layers(0, 2), Layers(3, 6), has_input=True, has_output=True)
    visits = [(first, Layers(0, 2)), (shard(Layers(2, 3)), Layers(2, 3)), (first, Layers(3, 6))]
    np.testing.assert_array_equal(run_in_steps(visits), run_in_steps([(whole(), Layers(0, 6))]))


def test_a_visit_may_be_a_part_of_a_loaded_range() -> None:
    one = whole()
    np.testing.assert_array_equal(
        run_in_steps([(one, Layers(0, 4)), (one, Layers(4, 6))]), run_in_steps([(whole(), Layers(0, 6))])
    )


def test_kv_operations_change_the_visited_layers_only() -> None:
    one = shard(Layers(0, 2), Layers(3, 5))
    x = np.ones((1, 24), np.float32)
    one.run(Layers(0, 2), x, step_of(7, [1], kv=[opened(7)]))
    with pytest.raises(FrameError, match="not open"):
        one.run(Layers(3, 5), x, step_of(7, [1]))
    one.run(Layers(3, 5), x, step_of(7, [1], kv=[opened(7)]))


def test_a_step_without_rows_changes_the_cache_only() -> None:
    one = whole()
    pass_through([(one, Layers(0, 6))], step_of(0, IDS, kv=[opened(0)]))
    nothing = np.empty((0, 24), np.float32)
    drop = Step((), (KvOp(KvKind.DROP, 0),))
    assert one.embed(drop).shape == (0, 24)
    assert one.run(Layers(0, 6), nothing, drop).shape == (0, 24)
    with pytest.raises(FrameError, match="not open"):
        pass_through([(one, Layers(0, 6))], step_of(0, [1], start=len(IDS)))


def test_a_fork_and_what_is_made_shorter_go_on_as_a_fresh_sequence_would() -> None:
    visits = [(whole(), Layers(0, 6))]
    fresh = logits_of_all([(whole(), Layers(0, 6))], step_of(0, [*IDS[:9], 3, 4], kv=[opened(0)]))[9:]
    logits_of_all(visits, step_of(0, IDS, kv=[opened(0)]))
    fork = KvOp(KvKind.FORK, 1, length=9, capacity=20, source=0)
    shorter = KvOp(KvKind.MOVE, 0, length=9, capacity=64, source=0)
    forked = Step((Chunk(1, 9, 2), Chunk(0, 9, 2)), (fork, shorter), (3, 4, 3, 4))
    both = logits_of_all(visits, forked)
    np.testing.assert_array_equal(both[:2], fresh)
    np.testing.assert_array_equal(both[2:], fresh)


def test_layers_are_acquired_in_order_and_released() -> None:
    store = MODEL.store()
    one = whole(store=store)
    assert store.log == list(range(6))
    pass_through([(one, Layers(0, 6))], step_of(0, IDS, kv=[opened(0)]))
    assert store.log == [*range(6), *range(6)]
    assert not store.held


def test_a_layer_is_released_when_its_compute_fails() -> None:
    store, ops = MODEL.store(), ReferenceOps(exact_product, KvType.F32)
    one = OpsShard(ops, MODEL.spec, Slice((Layers(0, 6),), has_input=True), store)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    ops.swiglu = fail  # type: ignore[method-assign, assignment]  # stands for any fault inside a block
    with pytest.raises(OSError, match="the disk is gone"):
        pass_through([(one, Layers(0, 6))], step_of(0, IDS, kv=[opened(0)]))
    assert not store.held


class MovingStore(ArrayStore):
    """Holds each layer somewhere else at every visit, as a store that streams does; what was released is spoilt."""

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        self.moved = {
            name: Weight(name, weight.type, weight.shape, weight.data.copy())
            for name, weight in super().acquire(layer).items()
        }
        return self.moved

    def release(self, layer: int) -> None:
        super().release(layer)
        for weight in self.moved.values():
            weight.data[:] = 0xFF


def test_weights_that_move_between_visits_are_bound_again() -> None:
    moving = whole(store=MovingStore(MODEL))
    np.testing.assert_array_equal(run_in_steps([(moving, Layers(0, 6))]), run_in_steps([(whole(), Layers(0, 6))]))


def test_weights_that_stay_are_bound_once() -> None:
    class CountingOps(ReferenceOps):
        bound = 0

        def matrix(self, weight: Weight, bias: Weight | None = None):  # type: ignore[no-untyped-def]  # a spy
            self.bound += 1
            return super().matrix(weight, bias)

    model = small_model(small_spec(tied_output=True))
    ops = CountingOps(exact_product, KvType.F32)
    one = OpsShard(ops, model.spec, Slice((Layers(0, 3),), True, True), model.store())
    after_load = ops.bound
    assert after_load == 1 + 3 * 7  # the tied table once
    logits_of_all([(one, Layers(0, 3))], step_of(0, IDS, kv=[opened(0)]))
    assert ops.bound == after_load


@pytest.mark.parametrize(("context", "factors"), [(8, ROPE_SHORT), (16, ROPE_SHORT), (17, ROPE_LONG), (0, ROPE_LONG)])
def test_the_served_context_chooses_the_factors_of_longrope(context: int, factors: str) -> None:
    """0: the model's own, 128. Not the length of the sequence: all of these have 13 positions."""
    spec = small_spec()
    plain = small_model(spec)
    tensors = {name: np.linspace(1, top, 4, dtype=np.float32) for name, top in ((ROPE_SHORT, 2), (ROPE_LONG, 9))}
    long = replace(
        plain, spec=replace(spec, rope=replace(spec.rope, original_context=16)), shared={**plain.shared, **tensors}
    )
    expected = replace(plain, shared={**plain.shared, ROPE_FREQS: tensors[factors]})
    logits = []
    for model, part in ((long, Slice((Layers(0, 3),), True, True, context=context)), (expected, None)):
        ops = ReferenceOps(exact_product, KvType.F32)
        one = OpsShard(ops, model.spec, part or Slice((Layers(0, 3),), True, True), model.store())
        logits.append(logits_of_all([(one, Layers(0, 3))], step_of(0, IDS, kv=[opened(0)])))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_logits_are_of_the_rows_that_are_asked_for() -> None:
    one = whole()
    x = pass_through([(one, Layers(0, 6))], step_of(0, IDS, kv=[opened(0)]))
    everything = one.logits(x, range(len(IDS)))
    np.testing.assert_array_equal(one.logits(x, [12, 3]), everything[[12, 3]])
    assert one.logits(x, []).shape == (0, 50)


@pytest.mark.parametrize("rows", [[13], [-1]])
def test_logits_of_rows_that_do_not_exist_are_refused(rows: list[int]) -> None:
    with pytest.raises(FrameError, match="rows"):
        whole().logits(np.zeros((13, 24), np.float32), rows)


@pytest.mark.parametrize("layers", [Layers(1, 3), Layers(0, 1), Layers(3, 7), Layers(4, 3)])
def test_layers_of_others_are_refused(layers: Layers) -> None:
    one = shard(Layers(1, 2), Layers(3, 6))
    with pytest.raises(PlanError, match=r"not on this shard .*\[1, 2\), \[3, 6\)"):
        one.run(layers, np.ones((1, 24), np.float32), step_of(0, [1], kv=[opened(0)]))


def test_ends_of_the_model_are_only_where_they_were_loaded() -> None:
    one = shard(Layers(0, 6))
    with pytest.raises(PlanError, match="no input part"):
        one.embed(step_of(0, [1]))
    with pytest.raises(PlanError, match="no output part"):
        one.logits(np.ones((1, 24), np.float32), [0])


@pytest.mark.parametrize("ids", [[50], [-1]])
def test_token_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(FrameError, match="outside the vocabulary of 50"):
        whole().embed(step_of(0, ids))


def test_a_step_must_bring_a_token_for_each_row() -> None:
    with pytest.raises(FrameError, match="2 rows carries 1"):
        whole().embed(Step((Chunk(0, 0, 2),), tokens=(1,)))


@pytest.mark.parametrize(
    "activation", [np.ones((2, 24), np.float32), np.ones((1, 23), np.float32), np.ones((1, 24), np.float16)]
)
def test_activations_of_another_shape_or_type_are_refused(activation: FloatArray) -> None:
    one = whole()
    with pytest.raises(FrameError, match="an activation is"):
        one.run(Layers(0, 6), activation, step_of(0, [1], kv=[opened(0)]))
    one.run(Layers(0, 6), np.ones((1, 24), np.float32), step_of(0, [1], kv=[opened(0)]))  # nothing was opened


def test_a_closed_shard_refuses_work_and_lets_weights_go() -> None:
    one = whole()
    one.close()
    one.close()
    with pytest.raises(PlanError):
        one.run(Layers(0, 6), np.ones((1, 24), np.float32), step_of(0, [1], kv=[opened(0)]))
    with pytest.raises(PlanError):
        one.embed(step_of(0, [1]))


class CopyingOps(ReferenceOps):
    copies = True


def test_what_a_device_copied_is_given_back_once() -> None:
    store = MODEL.store()
    OpsShard(CopyingOps(exact_product), MODEL.spec, Slice((Layers(0, 2),), has_input=True), store)
    layers = [weight.name for layer in (0, 1) for weight in store.views(layer).values()]
    assert sorted(store.given_back) == sorted([*layers, "token_embd.weight"])
    OpsShard(ReferenceOps(exact_product), MODEL.spec, Slice((Layers(0, 2),)), kept := MODEL.store())
    assert not kept.given_back
