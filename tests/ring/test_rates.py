"""A device is timed by layers of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ClusterError, DeviceMemoryError
from prima_core.interfaces import Backend, Device, Layers, Slice, Step, Store
from prima_core.memory.system import System, host
from prima_core.model.weights import Model, end_tensors
from prima_core.node.coordinate import model_facts
from prima_core.plan import costs
from prima_core.plan.costs import compute_s
from prima_core.plan.problem import OUTPUT, DeviceFacts
from prima_core.plan.profile import DeviceRates
from prima_core.ring import rates, timing
from prima_core.ring.rates import Bench, Sample, decode_rate, sample_of, touched_types, typical_layers
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

if TYPE_CHECKING:
    from prima_core.interfaces import Shard
    from prima_core.model.spec import ModelSpec

CPU = Device("fake:cpu", 20_000_000)
OUTPUT_PART = Slice((), has_output=True)


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
        self.rows, self.output = list[int](), 0

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        for layer in (layer for layers in part.layers for layer in layers):
            self.held[layer] = sum(len(weight.data) for weight in store.acquire(layer).values())
            store.release(layer)
        names = end_tensors(model, part)
        self.output = sum(len(weight.data) for name, weight in store.shared().items() if name in names)
        return cast("Shard", self)

    def run(self, layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        assert step.n_tokens == len(activation)
        assert all(chunk.start + chunk.count <= timing.POSITIONS for chunk in step.chunks)
        self.clock.now += len(activation) * self.clock.s_per_token + self.clock.is_first
        self.clock.is_first = False
        self.widths += [len(activation)] if len(activation) else []
        return activation

    def logits(self, activation: NDArray[np.float32], rows: Sequence[int]) -> NDArray[np.float32]:
        self.clock.now += len(rows) * self.clock.s_per_token
        self.rows += [len(rows)]
        return activation

    def close(self) -> None:
        self.is_closed = True


def device_rates(
    backend: Backend, device: Device, model: Model, system: System, stop: Callable[[], bool]
) -> DeviceRates:
    return rates.device_rates(Bench(backend, device, model, 1 << 60, system, stop))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=6))
    with open_model(path) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(0.001)
    monkeypatch.setattr(rates, "time", made)
    monkeypatch.setattr(timing, "time", made)
    return made


def test_the_rate_is_bytes_of_layers_per_second_of_a_step(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    clock.is_first = False
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    n_bytes = sum(backend.held.values())
    assert 0 < n_bytes <= CPU.memory_bytes / rates.MEMORY_SHARE
    assert found.decode_bytes_s == pytest.approx(n_bytes / 0.001)
    assert found.prefill_bytes_s == pytest.approx(n_bytes / 0.001)
    assert set(backend.widths) == {1, 4, 16, 128}
    assert backend.is_closed


def test_each_width_has_its_rate_and_so_has_the_output(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    n_bytes = sum(backend.held.values())
    assert set(found.rates) == {"F32", OUTPUT}
    assert dict(found.rates["F32"]) == pytest.approx({w: n_bytes / (0.001 * w) for w in (1, 4, 16, 128)})
    assert dict(found.rates[OUTPUT]) == pytest.approx({w: backend.output / (0.001 * w) for w in (1, 4, 16)})
    facts = DeviceFacts("d", 1, decode_bytes_s=found.decode_bytes_s, rates=found.rates)
    assert compute_s(facts, {"F32": n_bytes}, 64) == pytest.approx(0.064)


def test_layers_of_every_kind_are_run(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=8, d_model=256, d_ff=512, types="Q4_K_M"))
    with open_model(path) as model:
        kinds = {layer: frozenset(touched_types(model, layer, 1)) for layer in range(8)}
        sample = sample_of(model, 1)
        assert len(sample.run) == 1
        assert {kinds[layer] for layers in sample.singles for layer in layers} == set(kinds.values())
        assert sample_of(model, 10**9).others == ()


def test_types_that_differ_are_told_apart(tmp_path: Path, clock: Clock) -> None:
    """Every byte of Q6_K takes twice as long as one of Q4_K, and layers alone a third longer than together."""
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=8, d_model=256, d_ff=512, types="Q4_K_M"))
    with open_model(path) as model:
        backend = Timed(clock)

        def run(layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
            types = [touched_types(model, layer, 1) for layer in layers]
            byte_s = {"Q6_K": 2e-9}
            took_s = sum(size * byte_s.get(name, 1e-9) for of in types for name, size in of.items())
            clock.now += took_s * (4 / 3 if len(layers) == 1 and len(activation) < 16 else 1)
            return activation

        backend.run = run  # type: ignore[method-assign]
        found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    for width in (1, 4, 16, 128):
        assert dict(found.rates["Q4_K"])[width] == pytest.approx(1e9, rel=0.05)
        assert dict(found.rates["Q6_K"])[width] == pytest.approx(0.5e9, rel=0.05)


def test_no_more_of_the_hosts_memory_is_taken_than_the_node_may_use(model: Model, clock: Clock) -> None:
    backend, large = Timed(clock), Device("fake:cpu", 1 << 60)
    layer = sizes_of(model)[0]
    rates.device_rates(Bench(cast("Backend", backend), large, model, 3 * layer, host(), lambda: False))
    assert sum(backend.held.values()) == layer
    own = Device("fake:gpu", 1 << 60, shares_host=False)
    rates.device_rates(Bench(cast("Backend", backend), own, model, 3 * layer, host(), lambda: False))
    assert len(backend.held) == 6


def test_layers_that_the_node_has_no_memory_for_are_not_measured(model: Model, clock: Clock) -> None:
    layer = sizes_of(model)[0]
    for measured in (rates.device_rates, decode_rate):
        backend = Timed(clock)
        bench = Bench(cast("Backend", backend), CPU, model, layer - 1, host(), lambda: False)
        with pytest.raises(DeviceMemoryError, match="a layer takes"):
            measured(bench)
        assert not backend.held


def test_rarer_layers_are_left_out_where_they_have_no_room(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", TinyModel(n_layers=8, d_model=256, d_ff=512, types="Q4_K_M"))
    with open_model(path) as model:
        whole = sample_of(model, 1)
        assert whole.others
        assert sample_of(model, 1, sizes_of(model)[whole.run.start]) == Sample(whole.run)


def test_a_program_that_was_at_work_for_a_moment_does_not_count(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    run = backend.run

    def disturbed(layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        clock.s_per_token = 0.001 if 16 in backend.widths else 0.002
        return run(layers, activation, step)

    backend.run = disturbed  # type: ignore[method-assign]
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    assert found.decode_bytes_s == pytest.approx(sum(backend.held.values()) / 0.001)


def test_in_brief_a_token_at_a_time_is_all(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    found = decode_rate(Bench(cast("Backend", backend), CPU, model, 1 << 60, host(), lambda: False))
    assert found.decode_bytes_s == pytest.approx(sum(backend.held.values()) / 0.001)
    assert found == DeviceRates(found.decode_bytes_s)
    assert (set(backend.widths), backend.rows, backend.is_closed) == ({1}, [], True)


def test_where_many_devices_are_timed_no_one_takes_long(model: Model, clock: Clock) -> None:
    backend, clock.s_per_token = Timed(clock), 0.1
    bench = Bench(cast("Backend", backend), CPU, model, 1 << 60, host(), lambda: False)
    assert rates.device_rates(bench, n_devices=20).rates.keys() == {"F32", OUTPUT}
    assert set(backend.widths) == {1}


def test_an_output_part_that_is_too_large_for_the_device_is_left_out(
    model: Model, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Timed(clock)
    small = Device("fake:cpu", sizes_of(model)[0])
    output_bytes = sum(model.file.tensors[name].n_bytes for name in end_tensors(model.spec, OUTPUT_PART))
    monkeypatch.setattr(rates, "OUTPUT_SHARE", small.memory_bytes / output_bytes + 1)
    found = device_rates(cast("Backend", backend), small, model, host(), lambda: False)
    assert OUTPUT not in found.rates
    assert not backend.rows


def test_what_finds_nothing_in_place_does_not_count(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    assert found.decode_bytes_s == pytest.approx(sum(backend.held.values()) / 0.001)


@pytest.mark.parametrize(("s_per_token", "widths"), [(0.03, {1, 4, 16}), (3.0, {1})], ids=["slow", "very slow"])
def test_a_slow_machine_is_not_kept_busy(model: Model, clock: Clock, s_per_token: float, widths: set[int]) -> None:
    backend, clock.s_per_token = Timed(clock), s_per_token
    found = device_rates(cast("Backend", backend), CPU, model, host(), lambda: False)
    assert set(backend.widths) == widths
    assert bool(found.prefill_bytes_s) == (16 in widths)


def test_it_can_be_given_up(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    with pytest.raises(ClusterError, match="given up"):
        device_rates(cast("Backend", backend), CPU, model, host(), lambda: True)


def test_what_was_copied_tells_how_fast_copying_is(model: Model, clock: Clock) -> None:
    backend = Timed(clock)
    copying = Device("fake:gpu", 20_000_000, copies=True)
    load = backend.load

    def slow(model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        clock.now += 2.0
        return load(model, device, part, store)

    backend.load = slow  # type: ignore[method-assign]
    found = device_rates(cast("Backend", backend), copying, model, host(), lambda: False)
    assert found.copy_bytes_s == pytest.approx(max(sum(backend.held.values()), backend.output) / 2, rel=0.1)


def sizes_of(model: Model) -> Sequence[int]:
    return [round(sum(touched_types(model, layer, 1).values())) for layer in range(model.spec.n_layers)]


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
        whole = sum(info.n_bytes for info in first)
        assert sum(touched_types(model, 0, 1).values()) == pytest.approx(whole - experts * 3 / 4)
        assert sum(touched_types(model, 0, 2).values()) == pytest.approx(whole - experts * 9 / 16)
        facts = model_facts(model, None)
        assert touched_types(model, 0, 3) == pytest.approx(costs.touched_types(facts, 0, 3))
