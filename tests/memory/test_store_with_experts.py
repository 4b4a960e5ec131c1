"""A store of a mixture: experts are left out of memory before other weights, and read when tokens choose them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from prima_core.arch.families import open_model
from prima_core.interfaces import Layers, Weight
from prima_core.memory.experts import Experts
from prima_core.memory.residency import Holding, holding
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import host
from prima_core.model.weights import Model
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.memory.fakes import FakeSystem, ends_of, streaming

N_LAYERS, N_EXPERTS, N_USED = 2, 9, 3
VISITS = [Layers(0, N_LAYERS)]
STACKS = ["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"]
TINY = TinyModel(
    arch="qwen3moe", d_model=128, d_ff=64, n_heads=4, n_kv_heads=4, vocab_size=500, types="F32", n_experts=N_EXPERTS,
    n_experts_used=N_USED,
)  # fmt: skip
EXPERT_BYTES = 3 * (128 * 64 * 4 + 2 * 4096)  # with what its pages hold of others


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(write_tiny_model(tmp_path_factory.mktemp("models") / "moe.gguf", TINY)) as model:
        yield model


@pytest.fixture(scope="module")
def held(model: Model) -> Holding:
    return holding(model.file.tensors, VISITS, ends_of(model))


def use(store: StreamingStore, model: Model, layer: int, chosen: list[int]) -> None:
    """As a step does; the very bytes of the file are there."""
    weights, expected = store.acquire(layer), model.store().views(layer)
    for name, weight in weights.items():
        if weight.require is None:
            np.testing.assert_array_equal(weight.data, expected[name].data)
    require = weights[STACKS[0]].require
    groups = [(np.array(chosen), np.array(chosen))] if require is None else require(np.array(chosen))
    for experts, places in groups:
        for name in STACKS:
            for expert, place in zip(experts.tolist(), places.tolist(), strict=True):
                np.testing.assert_array_equal(one(weights, name, place), one(expected, name, expert))
    store.release(layer)


def one(weights: Mapping[str, Weight], name: str, expert: int) -> object:
    return weights[name].part(expert, expert + 1).data


def test_experts_are_left_out_first_and_nothing_else_while_they_suffice(model: Model, held: Holding) -> None:
    with streaming(held.expert_bytes, 4 * EXPERT_BYTES, model=model, visits=VISITS, system=FakeSystem()) as store:
        for layer in range(N_LAYERS):
            weights = store.acquire(layer)
            assert [name for name, weight in weights.items() if weight.require] == STACKS
            assert {name for name in weights if store.is_streamed(f"blk.{layer}.{name}")} == set(STACKS)
            store.release(layer)
            assert store.acquire(layer) is weights  # what was bound stays right
            store.release(layer)


def test_a_model_whose_experts_all_stay_has_them_in_the_map(model: Model) -> None:
    with streaming(0, 0, model=model, visits=VISITS, system=FakeSystem()) as store:
        assert store.acquire(0)[STACKS[0]].require is None
        use(store, model, 0, [1, 2])
        assert store.stats().read_bytes == store.stats().expert_misses == 0


def test_stats_count_hits_misses_and_bytes(model: Model, held: Holding) -> None:
    system = FakeSystem()
    with streaming(held.expert_bytes, 8 * EXPERT_BYTES, model=model, visits=VISITS, system=system) as store:
        for _ in range(3):
            use(store, model, 0, [1, 2, 4])
            use(store, model, 1, [5, 2, 8])
        stats = store.stats()
        assert (stats.expert_hits, stats.expert_misses, stats.missed_bytes) == (12, 6, 0)
        assert stats.read_bytes == sum(length for _, length in system.reads) > 6 * 3 * 128 * 64 * 4
        assert stats.stall_s > 0
        assert stats.reading_s > 0
        assert stats.buffer_bytes == 8 * EXPERT_BYTES


def test_other_weights_stream_beside_experts_where_those_do_not_suffice(model: Model, held: Holding) -> None:
    streamed = held.expert_bytes + held.layer_bytes
    with streaming(streamed, 1_500_000, model=model, visits=VISITS, system=FakeSystem()) as store:
        for _ in range(3):
            for layer in range(N_LAYERS):
                use(store, model, layer, [0, 4, 8])
        stats = store.stats()
        assert (stats.missed_bytes, stats.seeks) == (0, 0)
        assert stats.expert_misses >= N_LAYERS * N_USED
        assert store.is_streamed("blk.0.attn_q.weight")


def test_a_store_that_is_made_smaller_drops_the_map_and_reads_on_demand(model: Model, held: Holding) -> None:
    system = FakeSystem()
    with streaming(0, 0, model=model, visits=VISITS, system=system) as store:
        use(store, model, 0, [1])
        store.resize(store.pinned_bytes - held.expert_bytes // 2)
        assert sum(n_bytes for _, n_bytes in system.dropped) >= held.expert_bytes
        for layer in range(N_LAYERS):
            use(store, model, layer, list(range(N_EXPERTS)))
        assert store.stats().expert_misses == N_LAYERS * N_EXPERTS
        system.released.clear()
        store.resize(store.pinned_bytes - held.expert_bytes // 2)
        assert system.released
        store.resize(held.total_bytes)
        for _ in range(2):
            for layer in range(N_LAYERS):
                use(store, model, layer, list(range(N_EXPERTS)))
        assert store.stats().streamed_bytes == 0


def test_a_layer_in_use_is_right_while_the_store_is_made_smaller(model: Model, held: Holding) -> None:
    with streaming(0, 0, model=model, visits=VISITS, system=FakeSystem()) as store:
        weights, expected = store.acquire(0), model.store().views(0)
        store.resize(0)
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight.data, expected[name].data)
        store.release(0)
        use(store, model, 0, [3])


def test_a_store_resized_while_experts_are_told_their_room_has_them_keep_to_the_last_size(
    model: Model, held: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize(experts: Experts, budget_bytes: int) -> None:
        budgets.append(budget_bytes)
        if len(budgets) == 2:  # the first is that of its making
            meanwhile.start()
            meanwhile.join(0.2)  # it has to wait for this, or would be undone by it
        tell(experts, budget_bytes)

    budgets: list[int] = []
    tell = Experts.resize
    monkeypatch.setattr(Experts, "resize", resize)
    with streaming(0, 0, model=model, visits=VISITS, system=FakeSystem()) as store:
        meanwhile = threading.Thread(target=lambda: store.resize(held.total_bytes - held.expert_bytes))
        store.resize(held.total_bytes - held.expert_bytes // 2)
        use(store, model, 0, [1])
        meanwhile.join()
        use(store, model, 0, list(range(N_EXPERTS)))
        assert store._experts is not None
        assert store._experts.n_bytes <= max(budgets[-1], store._experts.group_bytes)


def test_experts_leave_the_page_cache_alone_and_those_that_went_take_no_memory(tmp_path: Path) -> None:
    system, name = host(), f"blk.0.{STACKS[1]}"
    with open_model(write_tiny_model(tmp_path / "moe.gguf", TINY)) as model:
        with model.path.open("rb+") as file:
            os.fsync(file.fileno())
        mapped = model.file.view(name).data
        expected = mapped.reshape(N_EXPERTS, -1).copy()
        system.drop(mapped, model.path, model.file.tensors[name].offset)
        edges = system.resident_bytes(mapped, model.path)  # pages that it shares with other tensors
        if edges is None or edges > 2 * mmap.PAGESIZE:
            pytest.skip("a file stays in memory here, or the system does not tell")
        experts_bytes = holding(model.file.tensors, VISITS, ends_of(model)).expert_bytes
        with streaming(experts_bytes, 4 * EXPERT_BYTES, system, model, VISITS) as store:
            weight = store.acquire(0)[STACKS[1]]
            assert weight.require is not None
            assert system.resident_bytes(weight.data, model.path) == 0
            for expert in range(N_EXPERTS):
                for [_], [place] in weight.require(np.array([expert])):
                    np.testing.assert_array_equal(one({"": weight}, "", place), expected[expert])
            assert 0 < (system.resident_bytes(weight.data, model.path) or 0) <= 4 * EXPERT_BYTES // 3
            assert system.resident_bytes(mapped, model.path) == edges
            store.release(0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_experts_that_pass_on_a_device_stay_in_the_hosts_memory_as_far_as_that_goes(
    model: Model, held: Holding, share: float
) -> None:
    """They are all asked for in every pass there."""
    host_bytes = int(share * held.expert_bytes)
    sizes = held.expert_bytes, 4 * EXPERT_BYTES
    system = FakeSystem()
    with streaming(*sizes, model=model, visits=VISITS, system=system, host_bytes=host_bytes) as store:
        for _ in range(3):
            for layer in range(N_LAYERS):
                use(store, model, layer, list(range(N_EXPERTS)))
                passing = {weight.name for weight in store.views(layer).values() if store.is_streamed(weight.name)}
                assert passing == {f"blk.{layer}.{name}" for name in STACKS}
        stats = store.stats()
        assert stats.pinned_bytes - store.device_bytes == host_bytes
        assert (stats.expert_misses == 0) == (share == 1.0)
        assert bool(system.reads) == (share < 1.0)
