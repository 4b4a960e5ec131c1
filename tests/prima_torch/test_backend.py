from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prima_core.arch.families import open_model
from prima_core.errors import ConfigError, DeviceMemoryError, PluginError
from prima_core.interfaces import BackendOptions, Device, KvType, Layers, Slice
from prima_core.model.weights import Model
from prima_core.testing.driving import joined, opened, pass_through, step_of
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from prima_torch.backend import TorchBackend
from prima_torch.kv import TorchKv
from prima_torch.memory import RESERVE_BYTES, available_bytes
from prima_torch.ops import TorchOps
from prima_torch.support import Support
from tests.arch.small import logits_in_float64, small_model, small_spec

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 260, 50)]
GPU = Support("2.13.0", (13, 0), (13, 1))


def whole(model: Model) -> Slice:
    return Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True)


def test_a_whole_model_by_kernels_says_what_float64_says() -> None:
    """Many rows, then one of each of two sequences. Float32 weights are what Triton's interpreter reads the fastest."""
    model = small_model(small_spec(n_layers=1))
    ids = [token % 50 for token in IDS[:36]]
    part = Slice((Layers(0, 1),), has_input=True, has_output=True, kv_type=KvType.F32)
    shard = TorchBackend(BackendOptions(kernels="triton")).load(model.spec, "torch:cpu", part, model.store())
    visits = [(shard, Layers(0, 1))]
    prefill = joined(step_of(0, ids[:35], kv=[opened(0)]), step_of(1, ids[:1], kv=[opened(1)]))
    decode = joined(step_of(1, ids[1:2], 1), step_of(0, ids[35:], 35))
    rows = np.concatenate([pass_through(visits, prefill)[34:], pass_through(visits, decode)])
    expected = logits_in_float64(model, ids)[[34, 0, 1, 35]]
    np.testing.assert_allclose(shard.logits(rows, range(4)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---------------------------------------------------------------- devices


def test_a_cpu_shares_the_hosts_memory() -> None:
    backend = TorchBackend(BackendOptions(threads=1), available=lambda device: 1234)
    device = backend.devices()[-1]
    assert (device.id, device.memory_bytes, device.shares_host) == ("torch:cpu", 1234, True)
    assert device.summary.startswith("CPU, torch 2")
    assert backend.describe()["threads"] == "1"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="NVIDIA Toy", major=9, minor=0, total_memory=8_000_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((device.index + 2) << 30, 8 << 30))


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_is_a_device_with_memory_of_its_own() -> None:
    devices = TorchBackend(BackendOptions(), support=GPU).devices()
    summary = "NVIDIA Toy, compute capability 9.0, 8.0 GB"
    assert devices[:2] == [
        Device(f"torch:cuda:{n}", ((n + 2) << 30) - RESERVE_BYTES, summary, shares_host=False, copies=True)
        for n in range(2)
    ]
    assert devices[2].id == "torch:cpu"


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_with_less_than_the_reserve_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8 << 30))
    assert available_bytes(torch.device("cuda:0")) == 0


def test_what_is_used_is_described() -> None:
    facts = TorchBackend(BackendOptions(kernels="torch"), support=GPU).describe()
    assert facts["torch"] == torch.__version__
    assert facts["cuda"] == "13.0, the driver can do 13.1"
    assert facts["kernels"] == "torch's own: as asked"
    assert TorchBackend(BackendOptions(), support=GPU).describe()["kernels"].startswith("triton 3")


def test_without_triton_torchs_own_operations_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prima_torch.support.find_spec", lambda name: None)
    backend = TorchBackend(BackendOptions(), support=GPU)
    assert backend.describe()["kernels"] == "torch's own: triton is not installed"
    assert type(backend.ops("torch:cpu")) is TorchOps
    with pytest.raises(PluginError, match="Triton is not usable: triton is not installed"):
        TorchBackend(BackendOptions(kernels="triton"), support=GPU)


def test_a_cpu_computes_by_torchs_own_operations_unless_kernels_are_asked_for() -> None:
    assert type(TorchBackend(BackendOptions()).ops("torch:cpu")) is TorchOps
    assert type(TorchBackend(BackendOptions(kernels="triton")).ops("torch:cpu")) is not TorchOps


@pytest.mark.parametrize(("capability", "kernels"), [((6, 1), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_gpus_that_triton_does_not_know_compute_by_torchs_own_operations(
    capability: tuple[int, int], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert TorchBackend(BackendOptions(), support=GPU).has_kernels(torch.device("cuda:0")) is kernels


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (BackendOptions(kernels="pigeon"), "'pigeon' are unknown.*auto, triton, torch"),
        (BackendOptions(threads=-1), "-1 threads"),
    ],
)
def test_wrong_options_are_refused(options: BackendOptions, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TorchBackend(options)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(PluginError, match=r"no device 'torch:cuda:7' \(it has torch:cpu\)"):
        TorchBackend(BackendOptions()).ops("torch:cuda:7")


# ---------------------------------------------------------------- memory


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    tiny = TinyModel(types="Q4_K_M", d_ff=256, vocab_size=384)
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", tiny)) as model:
        yield model


def test_a_part_that_does_not_fit_is_refused_before_anything_is_uploaded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchOps, "matrix", lambda *args: pytest.fail("uploaded"))
    backend = TorchBackend(BackendOptions(), available=lambda device: 500_000)
    with pytest.raises(DeviceMemoryError, match=r"2 layers .* on torch:cpu.*1 of the layers would fit"):
        backend.load(model.spec, "torch:cpu", whole(model), model.store())


def test_a_device_that_is_full_sooner_than_it_said_names_the_layers_that_would_fit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if len(made) == 60:  # both ends and a layer have fewer fields, two layers have more
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        made.append(weakref.ref(field := torch.zeros(shape, dtype=dtype, device=device)))
        return field

    monkeypatch.setattr("prima_torch.planes.torch", SimpleNamespace(empty=empty, uint8=torch.uint8))
    alive: list[int] = []
    monkeypatch.setattr("prima_torch.backend.give_back", lambda _: alive.append(sum(ref() is not None for ref in made)))
    with pytest.raises(DeviceMemoryError, match=r"on torch:cpu, which has .* available: 1 of the layers would fit"):
        TorchBackend(BackendOptions()).load(model.spec, "torch:cpu", whole(model), model.store())
    assert alive == [0]  # only then can they be given back, and the device tells what is free


def test_other_faults_of_torch_are_not_called_a_lack_of_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("prima_torch.ops.fill_here", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        TorchBackend(BackendOptions()).load(model.spec, "torch:cpu", whole(model), model.store())


def test_weights_are_given_back_to_the_store_and_their_bytes_are_held_once(model: Model) -> None:
    ops = TorchBackend(BackendOptions()).ops("torch:cpu")
    shared = model.store().shared()
    matrix = ops.matrix(shared["output.weight"])
    assert matrix.planes.n_bytes == shared["output.weight"].data.nbytes
    assert ops.copies


def test_closing_gives_the_memory_back_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    kv = TorchKv(Slice(()), 2, 32, torch.device("cuda:0"))
    kv.close()
    assert emptied == [True]
