"""Mixtures of experts larger than memory say what they say when all is in memory, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ModelError
from prima_core.interfaces import BackendOptions, Layers, Slice, Step
from prima_core.memory.residency import Holding, holding
from prima_core.memory.store import StreamingStore
from prima_core.model.weights import Model
from prima_core.testing.driving import Visit, chunked, joined, logits_of_all, opened, step_of
from prima_core.testing.tinymodel import Arch, TinyModel, write_tiny_model
from prima_numpy.backend import DEVICE, NumpyBackend
from tests.memory.fakes import FakeSystem, ends_of

FloatArray = NDArray[np.float32]
ARCHS: tuple[Arch, ...] = ("mixtral", "qwen3moe")
N_EXPERTS, N_USED, N_LAYERS = 9, 3, 2
IDS = [int(i) for i in np.random.default_rng(7).integers(0, 320, 48)]


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    tiny = TinyModel(
        arch=request.param, types="Q4_K_M", d_ff=256, vocab_size=320, n_experts=N_EXPERTS, n_experts_used=N_USED
    )
    with open_model(write_tiny_model(tmp_path_factory.mktemp("models") / "moe.gguf", tiny)) as model:
        yield model


def held(model: Model) -> Holding:
    return holding(model.file.tensors, [Layers(0, N_LAYERS)], ends_of(model))


def expert_bytes(model: Model) -> int:
    """Of a layer's, with what its pages hold of others."""
    sizes = (sum(stacks.values()) // N_EXPERTS + 3 * 2 * 4096 for stacks in held(model).experts.values())
    return max(sizes)


@contextmanager
def store_for(model: Model, n_in_memory: int, system: FakeSystem) -> Iterator[StreamingStore]:
    """Of all layers' experts there is room for so many."""
    found = held(model)
    buffer_bytes = n_in_memory * expert_bytes(model)
    streamed_bytes = found.table_bytes + found.expert_bytes
    store = StreamingStore(
        model.file, model.spec, [Layers(0, N_LAYERS)], ends_of(model), streamed_bytes, buffer_bytes, system
    )
    try:
        store.start()
        yield store
    finally:
        store.close()


@contextmanager
def visit(model: Model, kind: str, n_in_memory: int | None, system: FakeSystem | None = None) -> Iterator[Visit]:
    part = Slice((Layers(0, N_LAYERS),), has_input=True, has_output=True)
    backend = NumpyBackend(BackendOptions(2, kind))
    if n_in_memory is None:
        yield backend.load(model.spec, DEVICE, part, model.store()), Layers(0, N_LAYERS)
        return
    with store_for(model, n_in_memory, system or FakeSystem()) as store:
        yield backend.load(model.spec, DEVICE, part, store), Layers(0, N_LAYERS)


def logits(where: Visit, steps: Callable[[], Iterator[Step]]) -> FloatArray:
    return np.concatenate([logits_of_all([where], step) for step in steps()])


def whole_text() -> Iterator[Step]:
    """A prompt as one chunk, another's chunks beside it, then tokens of both one by one."""
    yield from chunked(0, IDS[:30], 30)
    for start in (0, 7, 14):
        yield step_of(1, IDS[start : start + 7], start, [opened(1)] if start == 0 else [])
    for position in range(30, 40):
        yield joined(step_of(0, [IDS[position]], position), step_of(1, [IDS[position]], position - 9))


@pytest.mark.parametrize("kind", ["native", "int8", "exact"])
@pytest.mark.parametrize("n_in_memory", [0, 1, N_USED, 11, N_LAYERS * N_EXPERTS])
def test_logits_are_those_of_a_model_in_memory_to_the_bit(model: Model, kind: str, n_in_memory: int) -> None:
    with visit(model, kind, None) as whole, visit(model, kind, n_in_memory) as streamed:
        np.testing.assert_array_equal(logits(streamed, whole_text), logits(whole, whole_text))


def test_a_token_reads_at_most_what_it_uses_and_nothing_that_is_there(model: Model) -> None:
    system = FakeSystem()
    with visit(model, "native", N_LAYERS * N_USED, system) as where:
        logits_of_all([where], step_of(0, IDS[:1], kv=[opened(0)]))
        first = sum(length for _, length in system.reads)
        assert 0 < first <= N_LAYERS * N_USED * expert_bytes(model)
        system.reads.clear()
        for sequence in (1, 2):
            logits_of_all([where], step_of(sequence, IDS[:1], kv=[opened(sequence)]))
        assert system.reads == []


def test_a_read_error_ends_its_step_and_the_next_one_works(model: Model, tmp_path: Path) -> None:
    def broken(offset: int) -> None:
        raise OSError(5, "Input/output error")

    system = FakeSystem()
    with visit(model, "native", None) as whole, visit(model, "native", N_USED, system) as streamed:
        system.fault = broken
        with pytest.raises(ModelError, match=r"moe\.gguf cannot be read .*expert \d\): Input/output error"):
            logits_of_all([streamed], step_of(0, IDS[:5], kv=[opened(0)]))
        system.fault = lambda offset: None
        again = step_of(1, IDS[:5], kv=[opened(1)])
        np.testing.assert_array_equal(logits_of_all([streamed], again), logits_of_all([whole], again))
