import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ConfigError, DeviceMemoryError, PluginError
from prima_core.interfaces import BackendOptions, Chunk, KvType, Layers, Shard, Slice, Step
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.driving import chunked, joined, logits_of_all, opened, step_of
from prima_core.testing.reference import exact_logits, greedy_ids
from prima_core.testing.tinymodel import Arch, MatrixType, TinyModel, Types, write_tiny_model
from prima_numpy import backend as backend_module
from prima_numpy.backend import DEVICE, NumpyBackend
from prima_numpy.plugin import prima_backends
from tests.arch.small import small_model, small_spec

FloatArray = NDArray[np.float32]
KINDS = ["exact", "int8", "native"]
LAYERS = Layers(0, 2)
WHOLE = Slice((LAYERS,), has_input=True, has_output=True)
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 384, 70)]


def options(kind: str) -> BackendOptions:
    return BackendOptions(threads=2, kernels=kind)


def tiny(folder: Path, types: Types, arch: Arch = "llama") -> Path:
    path = folder / f"{arch}-{types}.gguf"
    if not path.exists():
        write_tiny_model(path, TinyModel(arch=arch, types=types, d_ff=256, vocab_size=384, tied_output=arch == "qwen2"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=KINDS)
def shard(request: pytest.FixtureRequest, folder: Path) -> Iterator[Shard]:
    """A whole model that mixes types, on each kind of kernels."""
    with open_model(tiny(folder, "Q4_K_M")) as model:
        loaded = NumpyBackend(options(request.param)).load(model.spec, DEVICE, WHOLE, model.store())
        yield loaded
        loaded.close()


def all_logits(shard: Shard, steps: Iterator[Step]) -> FloatArray:
    return np.concatenate([logits_of_all([(shard, LAYERS)], step) for step in steps])


# ---------------------------------------------------------------- a row's result does not depend on its company


def test_chunk_size_does_not_change_a_bit(shard: Shard) -> None:
    expected = all_logits(shard, chunked(0, IDS, 1, capacity=70))
    for sequence, chunk in enumerate((7, 16, 64), 1):
        np.testing.assert_array_equal(all_logits(shard, chunked(sequence, IDS, chunk, capacity=99)), expected)


def test_other_sequences_do_not_change_a_bit(shard: Shard) -> None:
    alone = all_logits(shard, chunked(0, IDS[:20], 20))
    prefill = joined(
        step_of(1, IDS[30:37], kv=[opened(1)]), step_of(2, IDS[:18], kv=[opened(2)]), step_of(3, [1], kv=[opened(3)])
    )
    in_company = logits_of_all([(shard, LAYERS)], prefill)[7 : 7 + 18]
    np.testing.assert_array_equal(in_company, alone[:18])
    for position in (18, 19):
        decode = joined(step_of(3, [5], position - 17), step_of(2, IDS[position : position + 1], position))
        np.testing.assert_array_equal(logits_of_all([(shard, LAYERS)], decode)[1], alone[position])


def test_a_text_in_two_chunks_of_one_step_does_not_change_a_bit(shard: Shard) -> None:
    alone = all_logits(shard, chunked(0, IDS[:20], 20))
    twice = Step((Chunk(1, 0, 9), Chunk(1, 9, 11)), (opened(1),), tuple(IDS[:20]))
    np.testing.assert_array_equal(logits_of_all([(shard, LAYERS)], twice), alone)


def test_activations_may_lie_anywhere_in_read_only_memory(shard: Shard) -> None:
    step = step_of(0, IDS[:5], kv=[opened(0)])
    x = shard.embed(step)
    frame = b"odd" + x.tobytes()
    expected = shard.run(LAYERS, x, step)
    again = step_of(1, IDS[:5], kv=[opened(1)])
    received = np.frombuffer(frame, np.float32, offset=3).reshape(x.shape)
    np.testing.assert_array_equal(shard.run(LAYERS, received, again), expected)
    np.testing.assert_array_equal(shard.logits(received, [4]), shard.logits(x, [4]))
    assert frame == b"odd" + x.tobytes()


# ---------------------------------------------------------------- kinds against each other


@pytest.mark.parametrize(
    ("arch", "types"), [("llama", types) for types in get_args(Types)] + [("qwen2", "F16"), ("qwen2", "Q4_K_M")]
)
def test_native_has_the_bits_of_its_twin(folder: Path, arch: Arch, types: Types) -> None:
    with open_model(tiny(folder, types, arch)) as model:
        native, twin = (
            NumpyBackend(options(kind)).load(model.spec, DEVICE, WHOLE, model.store()) for kind in ("native", "int8")
        )
        steps = list(chunked(0, IDS[:40], 33))
        for shard in (native, twin):
            assert shard.run(LAYERS, shard.embed(steps[0]), steps[0]).dtype == np.float32
        np.testing.assert_array_equal(
            logits_of_all([(native, LAYERS)], steps[1]), logits_of_all([(twin, LAYERS)], steps[1])
        )


@pytest.mark.parametrize("types", get_args(MatrixType))
def test_models_of_every_type_say_the_same_on_native_kernels_and_their_twin(folder: Path, types: Types) -> None:
    path = tiny(folder, types)
    native, twin = (greedy_ids(path, IDS[:20], 5, twin=kind) for kind in ("native", "int8"))
    assert native == twin


@pytest.mark.parametrize("types", get_args(Types))
def test_native_is_close_to_exact(folder: Path, types: Types) -> None:
    """Activations rounded to int8 (and K, V to float16) turn logits by a small angle."""
    exact = exact_logits(tiny(folder, types), IDS)
    with open_model(tiny(folder, types)) as model:
        native = NumpyBackend(options("native")).load(model.spec, DEVICE, WHOLE, model.store())
        rounded = all_logits(native, chunked(0, IDS, 70, capacity=70))
    cosines = (exact * rounded).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    weights = 256 if types == "Q4_K_M" else BLOCKS[GGUFType[types]].n_weights
    assert cosines.min() > {1: 0.99999, 32: 0.999, 256: 0.997}[weights]  # so many activations share a scale
    assert not np.array_equal(exact, rounded)


# ---------------------------------------------------------------- types of K and V


def logits_with(path: Path, kind: str, type: KvType, chunk: int = 64) -> FloatArray:
    with open_model(path) as model:
        loaded = NumpyBackend(options(kind)).load(model.spec, DEVICE, replace(WHOLE, kv_type=type), model.store())
        return all_logits(loaded, chunked(0, IDS, chunk, capacity=70))


@pytest.mark.parametrize("type", [KvType.F32, KvType.Q8_0])
def test_native_has_the_bits_of_its_twin_with_every_type_of_kv(folder: Path, type: KvType) -> None:
    path = tiny(folder, "Q4_K_M")
    native = logits_with(path, "native", type)
    np.testing.assert_array_equal(native, logits_with(path, "int8", type))
    np.testing.assert_array_equal(native, logits_with(path, "native", type, chunk=7))


@pytest.mark.parametrize(("type", "off"), [(KvType.F16, 3e-6), (KvType.Q8_0, 1e-3)])
def test_kept_shorter_k_and_v_turn_logits_by_a_small_angle(folder: Path, type: KvType, off: float) -> None:
    """Against those of float32 K and V, 1 - cosine; nothing else is rounded in a model of float32 weights."""
    archs: tuple[Arch, ...] = ("llama", "qwen2")
    for arch in archs:
        full, short = (logits_with(tiny(folder, "F32", arch), "native", kept) for kept in (KvType.F32, type))
        cosines = (full * short).sum(axis=1) / np.linalg.norm(full, axis=1) / np.linalg.norm(short, axis=1)
        assert 0 < 1 - cosines.min() < off


def test_exact_kernels_keep_float32_whatever_is_asked_for(folder: Path) -> None:
    path = tiny(folder, "Q8_0")
    full = logits_with(path, "exact", KvType.F32)
    for type in (KvType.F16, KvType.Q8_0):
        np.testing.assert_array_equal(logits_with(path, "exact", type), full)


def test_number_of_threads_does_not_change_a_bit(folder: Path) -> None:
    path = tiny(folder, "Q4_K_M")
    with open_model(path) as model:
        one, three = (
            all_logits(
                NumpyBackend(BackendOptions(threads, "native")).load(model.spec, DEVICE, WHOLE, model.store()),
                chunked(0, IDS, 64, capacity=70),
            )
            for threads in (1, 3)
        )
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_go_on_from_what_they_said(folder: Path, kind: str) -> None:
    path = tiny(folder, "F32")
    ids = greedy_ids(path, IDS[:10], 6, twin=kind, chunk=4)  # type: ignore[arg-type]  # a parameter of the test
    expected = exact_logits(path, IDS[:10] + ids[:-1])[9:].argmax(axis=1)
    assert ids == list(expected)


# ---------------------------------------------------------------- the backend


def test_offer_opens_without_help() -> None:
    [plugin] = prima_backends()
    assert (plugin.name, plugin.api, plugin.extra) == ("numpy", 1, None)
    assert plugin.probe().usable
    [device] = plugin.open(BackendOptions()).devices()
    assert device.id == DEVICE
    assert device.memory_bytes > 0


def test_auto_takes_the_native_kernels(caplog: pytest.LogCaptureFixture) -> None:
    facts = NumpyBackend(BackendOptions(threads=2)).describe()
    assert facts["kernels"].startswith("native")
    assert facts["threads"] == "2"
    assert not caplog.records


def test_auto_without_the_native_module_warns_and_takes_the_twin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _unbuilt(monkeypatch)
    with caplog.at_level(logging.WARNING):
        chosen = NumpyBackend(BackendOptions())
    assert chosen.describe()["kernels"] == "int8"
    assert "no module for this test" in chosen.devices()[0].summary + chosen.describe()["note"]
    [record] = caplog.records
    assert "no module for this test" in record.getMessage()


def test_native_that_is_not_built_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    _unbuilt(monkeypatch)
    with pytest.raises(PluginError, match=r"no module for this test .*C\+\+ compiler"):
        NumpyBackend(options("native"))


def test_unknown_kernels_are_refused_with_the_choice() -> None:
    with pytest.raises(ConfigError, match=r"'cuda' .*auto, native, int8, exact"):
        NumpyBackend(options("cuda"))


@pytest.mark.parametrize("n", [-1, 1025])
def test_numbers_of_threads_that_cannot_be_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"{n} threads"):
        NumpyBackend(BackendOptions(threads=n))


def test_unknown_device_is_refused() -> None:
    model = small_model(small_spec())
    with pytest.raises(PluginError, match=r"no device 'numpy:gpu' .*numpy:cpu"):
        NumpyBackend(options("exact")).load(model.spec, "numpy:gpu", Slice((Layers(0, 3),)), model.store())


@pytest.mark.parametrize("tied", [True, False])
def test_a_part_needs_memory_for_its_own_weights_only(tied: bool) -> None:
    model = small_model(small_spec(tied_output=tied))
    per_layer = sum(values.nbytes for values in model.layers[0].values())
    table, norm = 50 * 24 * 4, 24 * 4
    for part, needed in [
        (Slice((Layers(1, 2),)), per_layer),
        (Slice((Layers(0, 1), Layers(2, 3)), has_input=True), 2 * per_layer + table),
        (Slice((), has_output=True), table + norm),
        (Slice((), has_input=True, has_output=True), table * (1 if tied else 2) + norm),
    ]:
        NumpyBackend(options("exact"), available=lambda: needed).load(model.spec, DEVICE, part, model.store())  # noqa: B023
        with pytest.raises(DeviceMemoryError, match=r"would fit|alone fit"):
            NumpyBackend(options("exact"), lambda: needed - 1).load(model.spec, DEVICE, part, model.store())  # noqa: B023


def _unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "load_kernels", lambda threads: None)
    monkeypatch.setattr(backend_module, "native_fault", lambda: "no module for this test")
