"""The backend on this machine's CPU, and, with MLX's answers replaced, what it says where there is a GPU."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ConfigError, DeviceMemoryError, PluginError
from prima_core.interfaces import BackendOptions, KvType, Layers, Shard, Slice
from prima_core.model.quant import GGUFType
from prima_core.testing.reference import exact_logits
from prima_core.testing.tinymodel import MatrixType, TinyModel, big_shape, write_tiny_model
from prima_mlx import memory
from prima_mlx.backend import MlxBackend
from tests.arch.drive import chunked, joined, logits_of_all, opened, step_of
from tests.arch.small import small_model, small_spec
from tests.truth.cases import CASES, PROMPT_IDS

FloatArray = NDArray[np.float32]
GIB = 1 << 30
DEVICE = "mlx:gpu" if memory.has_gpu() else "mlx:cpu"
BRANCHES = (
    "llama-6-heads-share-1-of-48",
    "llama-tied-llama3-rope-f16",
    "llama-q4_k_m",
    "qwen2-heads-wider-than-model",
    "mistral3-yarn",
    "mixtral-q4_k_m",
    "qwen3-yarn-attention-factor",
    "qwen3moe-1-of-5-q8_0",
    "gemma2-8-heads-share-1",
    "gemma3-linear-rope",
    "phi3-8-heads-share-2-window",
    "phi3-long-rope-three-quarters-tied",
)
"""Between them: every family, scaling of rope, window, soft cap, bias, mixture."""


def whole(path: Path, kv_type: KvType = KvType.F32) -> Shard:
    with open_model(path) as model:
        part = Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True, kv_type=kv_type)
        return MlxBackend(BackendOptions()).load(model.spec, DEVICE, part, model.store())


def logits(path: Path, chunk: int = 33, kv_type: KvType = KvType.F32) -> FloatArray:
    with open_model(path) as model:
        layers = Layers(0, model.spec.n_layers)
    where = [(whole(path, kv_type), layers)]
    return np.concatenate([logits_of_all(where, step) for step in chunked(0, PROMPT_IDS, chunk, capacity=99)])


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", BRANCHES)
def test_models_of_every_family_say_what_the_exact_twin_says(name: str, tmp_path: Path) -> None:
    """Their files are closed by then: nothing of the weights stays in the map."""
    path = write_tiny_model(tmp_path / "tiny.gguf", CASES[name])
    np.testing.assert_allclose(logits(path), exact_logits(path, PROMPT_IDS), atol=5e-4)


@pytest.mark.parametrize("types", get_args(MatrixType))
def test_models_of_every_type_say_what_the_exact_twin_says(types: MatrixType, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(types=types, d_ff=256, vocab_size=384, n_layers=1))
    np.testing.assert_allclose(logits(path), exact_logits(path, PROMPT_IDS), atol=5e-4)


@pytest.mark.parametrize(("type", "off"), [(KvType.F16, 3e-6), (KvType.Q8_0, 1e-3)])
def test_kept_shorter_k_and_v_turn_logits_by_a_small_angle(type: KvType, off: float, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", CASES["llama-heads-wider-than-model"])
    full, short = logits(path), logits(path, kv_type=type)
    cosines = (full * short).sum(axis=1) / np.linalg.norm(full, axis=1) / np.linalg.norm(short, axis=1)
    assert 0 < 1 - cosines.min() < off


def test_chunks_and_company_change_nothing_that_can_be_seen(tmp_path: Path) -> None:
    """MLX may sum in another order for one row than for many: 1e-5 of the largest logit at most."""
    tiny, ids = CASES["llama-q4_k_m"], PROMPT_IDS[:34]
    where = [(whole(write_tiny_model(tmp_path / "tiny.gguf", tiny)), Layers(0, tiny.n_layers))]
    [alone] = [logits_of_all(where, step) for step in chunked(0, ids, len(ids))]
    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * float(np.abs(alone).max()))
    for sequence, chunk in enumerate((1, 7), 1):
        near(np.concatenate([logits_of_all(where, step) for step in chunked(sequence, ids, chunk)]), alone)
    first, last = step_of(70, PROMPT_IDS[9:39], kv=[opened(70)]), step_of(71, [3], kv=[opened(71)])
    prefill = joined(first, step_of(72, ids[:33], kv=[opened(72)]), last)
    near(logits_of_all(where, prefill)[30:63], alone[:33])
    decode = joined(step_of(71, [5], 1), step_of(72, ids[33:34], 33), step_of(70, [8], 30))
    near(logits_of_all(where, decode)[1], alone[33])


# ---------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
import psutil
from prima_core.arch.families import open_model
from prima_core.interfaces import BackendOptions, Layers, Slice
from prima_mlx.backend import MlxBackend
from prima_mlx.quant import device_bytes
from prima_core.ring.loading import LoadingStore

with open_model(sys.argv[1]) as model:
    backend = MlxBackend(BackendOptions())
    part = Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True)
    store = LoadingStore(model.store(), model.spec, [part], lambda done, total: None)
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


@pytest.mark.parametrize(("host", "memory_bytes"), [(20 * GIB, 7 * GIB), (2 * GIB, 2 * GIB)])
def test_with_metal_the_device_is_the_gpu_in_the_hosts_memory(
    metal: list[int], monkeypatch: pytest.MonkeyPatch, host: int, memory_bytes: int
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": host}))
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


def test_unknown_kernels_are_refused_with_the_choice() -> None:
    with pytest.raises(ConfigError, match=r"'native' .*one of: auto"):
        MlxBackend(BackendOptions(kernels="native"))


def test_unknown_device_is_refused() -> None:
    model = small_model(small_spec())
    with pytest.raises(PluginError, match=rf"no device 'mlx:tpu' .*{DEVICE}"):
        MlxBackend(BackendOptions()).load(model.spec, "mlx:tpu", Slice((Layers(0, 3),)), model.store())
