"""The backend on this machine's CPU, and, with MLX's answers replaced, what it says where there is a GPU."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import BackendOptions, KvType, Layers, Slice
from prima_core.memory.system import Memory
from prima_core.model.quant import GGUFType
from prima_core.testing.driving import chunked, logits_of_all
from prima_core.testing.reference import exact_logits
from prima_core.testing.tinymodel import TinyModel, big_shape, write_tiny_model
from prima_mlx import memory
from prima_mlx.backend import MlxBackend
from tests.arch.small import small_model, small_spec
from tests.truth.cases import CASES, PROMPT_IDS

FloatArray = NDArray[np.float32]
GIB = 1 << 30
DEVICE = "mlx:gpu" if memory.has_gpu() else "mlx:cpu"


def test_a_loaded_model_needs_its_file_no_more(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", CASES["qwen3moe-1-of-5-q8_0"])
    with open_model(path) as model:
        layers = Layers(0, model.spec.n_layers)
        part = Slice((layers,), has_input=True, has_output=True, kv_type=KvType.F32)
        shard = MlxBackend(BackendOptions()).load(model.spec, DEVICE, part, model.store())
    steps = chunked(0, PROMPT_IDS, 33, capacity=99)
    logits = np.concatenate([logits_of_all([(shard, layers)], step) for step in steps])
    np.testing.assert_allclose(logits, exact_logits(path, PROMPT_IDS), atol=5e-4)


# ---------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
import psutil
from prima_core.arch.families import open_model
from prima_core.interfaces import BackendOptions, Layers, Slice
from prima_mlx.backend import MlxBackend
from prima_mlx.quant import device_bytes
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import host
from prima_core.model.weights import end_tensors
from prima_core.ring.loading import LoadingStore

with open_model(sys.argv[1]) as model:
    backend = MlxBackend(BackendOptions())
    part = Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True)
    own = StreamingStore(model.file, model.spec, part.layers, end_tensors(model.spec, part), 0, 0, host())
    store = LoadingStore(own, model.spec, [part], lambda done, total: None, host())
    views = [*store.shared().values(), *(w for layer in part.layers[0] for w in store.views(layer).values())]
    store.give_back(views)
    before = psutil.Process().memory_info().rss
    [device] = backend.devices()
    shard = backend.load(model.spec, device.id, part, store)
    taken = psutil.Process().memory_info().rss - before
    print(taken, sum(map(device_bytes, views)), sum(w.data.nbytes for w in views))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system takes pages back when it likes to")
def test_a_loaded_model_is_in_memory_once(tmp_path: Path) -> None:
    shape = TinyModel(
        n_layers=4, d_model=1024, n_heads=8, n_kv_heads=8, d_ff=3584, vocab_size=32000, types="Q4_K_M"
    )  # fmt: skip
    path = big_shape(tmp_path / "big.gguf", shape)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    taken, on_device, in_file = map(int, done.stdout.split())
    assert in_file > 70e6
    assert 0.9 * on_device < taken < on_device + 0.3 * in_file


def test_a_part_needs_what_its_weights_and_kv_take_on_the_device(tmp_path: Path) -> None:
    tiny = replace(CASES["llama-q4_k"], n_layers=2)
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", tiny)) as model:
        store, part = model.store(), Slice((Layers(0, 2),), kv_tokens=100)
        file = sum(w.data.nbytes for layer in (0, 1) for w in store.views(layer).values() if w.type is GGUFType.Q4_K)
        rest = sum(w.data.nbytes for layer in (0, 1) for w in store.views(layer).values() if w.type is GGUFType.F32)
        kv = 2 * 100 * 2 * model.spec.n_kv_heads * model.spec.head_dim * 2
        needed = file // 3 * 4 + rest + kv
        MlxBackend(BackendOptions(), lambda: needed).load(model.spec, DEVICE, part, store)
        with pytest.raises(DeviceMemoryError, match=rf"on {DEVICE}.*1 of the layers would fit"):
            MlxBackend(BackendOptions(), lambda: needed - 1).load(model.spec, DEVICE, part, store)


# ---------------------------------------------------------------- the backend


def test_without_a_gpu_the_device_is_the_cpu_and_its_memory_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_metal", lambda: False)
    monkeypatch.setattr(memory, "has_gpu", lambda: False)
    backend = MlxBackend(BackendOptions(threads=3))
    [device] = backend.devices()
    assert (device.id, device.shares_host) == ("mlx:cpu", True)
    assert device.memory_bytes > GIB // 8
    assert device.growth["Q4_K"] == pytest.approx(4 / 3)
    assert backend.describe()["library"] == f"mlx {version('mlx')}"
    backend.close()


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """MLX as on Apple silicon, with 10 GiB of which 3 are taken. Gives the wired limits that are set."""
    wired: list[int] = []
    info = {"device_name": "Apple M9", "max_recommended_working_set_size": 10 * GIB}
    monkeypatch.setattr(memory, "has_metal", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * GIB)
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    return wired


@pytest.mark.parametrize(("available", "memory_bytes"), [(20 * GIB, 7 * GIB), (2 * GIB, 2 * GIB)])
def test_with_metal_the_device_is_the_gpu_in_the_hosts_memory(
    metal: list[int], monkeypatch: pytest.MonkeyPatch, available: int, memory_bytes: int
) -> None:
    host = SimpleNamespace(memory=lambda: Memory(64 * GIB, available))
    monkeypatch.setattr(memory, "host", lambda: host)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    backend = MlxBackend(BackendOptions())
    [device] = backend.devices()
    assert (device.id, device.shares_host, device.memory_bytes) == ("mlx:gpu", True, memory_bytes)
    assert (device.summary, backend.describe()["kernels"]) == ("Apple M9, Metal", "Metal")


def test_with_metal_weights_are_wired_until_the_backend_is_closed(metal: list[int]) -> None:
    backend = MlxBackend(BackendOptions())
    model = small_model(small_spec())
    assert metal == []
    backend.load(model.spec, "mlx:gpu", Slice((Layers(0, 3),)), model.store()).close()
    assert metal == [10 * GIB]
    backend.close()
    assert metal == [10 * GIB, 0]


def test_with_cuda_memory_is_the_gpus_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "H1", "free_memory": 5 * GIB})
    monkeypatch.setattr(mx, "get_cache_memory", lambda: GIB)
    [device] = MlxBackend(BackendOptions()).devices()
    assert (device.id, device.shares_host, device.memory_bytes) == ("mlx:gpu", False, 6 * GIB)
    assert device.summary == "H1, CUDA"


def test_all_of_mlx_happens_in_the_owner_thread(tmp_path: Path) -> None:
    """MLX refuses to go on elsewhere with what one thread began: opening a backend begins nothing."""
    tiny = CASES["llama-tied"]
    backend, layers = MlxBackend(BackendOptions()), Layers(0, tiny.n_layers)
    part = Slice((layers,), has_input=True, has_output=True)
    with (
        open_model(write_tiny_model(tmp_path / "tiny.gguf", tiny)) as model,
        ThreadPoolExecutor(1) as owner,
    ):
        shard = owner.submit(backend.load, model.spec, DEVICE, part, model.store()).result()
        for step in chunked(0, PROMPT_IDS[:9], 8):
            logits = owner.submit(logits_of_all, [(shard, layers)], step).result()
    assert np.isfinite(logits).all()
