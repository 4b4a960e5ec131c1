"""A device is timed by layers of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ClusterError
from prima_core.interfaces import Backend, Device, Layers, Slice, Step, Store
from prima_core.memory.system import host
from prima_core.model.weights import Model
from prima_core.ring import rates
from prima_core.ring.rates import device_rates, touched_bytes, typical_layers
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

if TYPE_CHECKING:
    from prima_core.interfaces import Shard
    from prima_core.model.spec import ModelSpec

CPU = Device("fake:cpu", 20_000_000)


class Clock:
    """Each step takes `s_per_token` for every token, and a second more for the first of all."""

    def __init__(self, s_per_token: float) -> None:
        self.now, self.s_per_token, self.is_first = 0.0, s_per_token, True

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """A backend and its shard. Notes what it is asked for."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.widths, self.is_closed, self.held = clock, list[int](), False, dict[int, int]()

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        for layer in part.layers[0]:
            self.held[layer] = sum(len(weight.data) for weight in store.acquire(layer).values())
            store.release(layer)
        return cast("Shard", self)

    def run(self, layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        assert step.n_tokens == len(activation)
        assert all(chunk.start + chunk.count <= rates._POSITIONS for chunk in step.chunks)
        self.clock.now += len(activation) * self.clock.s_per_token + self.clock.is_first
        self.clock.is_first = False
        self.widths += [len(activation)] if len(activation) else []
        return activation

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=6))
    with open_model(path) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(0.001)
    monkeypatch.setattr(rates, "time", made)
    return made


def test_the_rate_is_bytes_of_layers_per_second_of_a_step(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    clock.is_first = False
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    n_bytes = sum(backend.held.values())
    assert 0 < n_bytes <= CPU.memory_bytes / rates.MEMORY_SHARE
    assert found.decode_bytes_s == pytest.approx(n_bytes / 0.001)
    assert found.prefill_bytes_s == pytest.approx(n_bytes / 0.001)
    assert set(backend.widths) == {1, 16, 128}
    assert backend.is_closed


def test_what_finds_nothing_in_place_does_not_count(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    assert found.decode_bytes_s == pytest.approx(sum(backend.held.values()) / 0.001)


@pytest.mark.parametrize(("s_per_token", "widths"), [(0.03, {1, 16}), (3.0, {1})], ids=["slow", "very slow"])
def test_a_slow_machine_is_not_kept_busy(model: Model, clock: Clock, s_per_token: float, widths: set[int]) -> None:
    backend, clock.s_per_token = Timed(clock), s_per_token
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    assert set(backend.widths) == widths
    assert bool(found.prefill_bytes_s) == (16 in widths)


def test_it_can_be_given_up(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    with pytest.raises(ClusterError, match="given up"):
        device_rates(cast("Backend", backend), CPU, model, host(), lambda: True)


def sizes_of(model: Model) -> Sequence[int]:
    return [touched_bytes(model, Layers(layer, layer + 1)) for layer in range(model.spec.n_layers)]


def test_layers_are_as_the_mean_of_all(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=8, d_model=256, d_ff=512, types="Q4_K_M"))
    with open_model(path) as model:
        sizes = sizes_of(model)
        mean = sum(sizes) / len(sizes)
        assert len(set(sizes)) > 1
        two = typical_layers(model, int(2 * mean))
        assert len(two) == 2
        windows = [abs(sum(sizes[at : at + 2]) - 2 * mean) for at in range(7)]
        assert windows[two.start] == min(windows)
        assert len(typical_layers(model, 1)) == 1
        assert typical_layers(model, 10 * sum(sizes)) == Layers(0, 8)


def test_of_experts_only_those_of_a_token_count(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(arch="qwen3moe", n_experts=8, n_experts_used=2))
    with open_model(path) as model:
        first = [info for name, info in model.file.tensors.items() if name.startswith("blk.0.")]
        experts = sum(info.n_bytes for info in first if len(info.shape) == 3)
        assert experts > 0
        assert touched_bytes(model, Layers(0, 1)) == sum(info.n_bytes for info in first) - experts * 3 // 4
