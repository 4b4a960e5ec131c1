"""The numpy backend does what the kit asks of every backend, and faults are found by the check that names them."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import MAX_GROWTH, Backend, BackendOptions, BackendPlugin, Device, KvType, Probe
from prima_core.testing.backends import check as check_module
from prima_core.testing.checks import CheckFailed, Report, State, Tolerance, check_backend
from prima_core.testing.examples import ARCHS, TYPES
from prima_core.testing.tinymodel import Arch, MatrixType
from prima_numpy.kv import NumpyKv
from prima_numpy.plugin import prima_backends
from tests.testing import faults
from tests.testing.faults import plugin, with_kv, with_ops, with_shard

[NUMPY] = prima_backends()
TO_INT8 = Tolerance(logits=1e-4, blocks=0.1)


def test_native_kernels_conform() -> None:
    report = check_backend(NUMPY, options=BackendOptions(1, "native"), tolerance=TO_INT8)
    assert {f"type {type}" for type in TYPES} <= {check.name for check in report.checks}
    assert {f"family {arch}" for arch in ARCHS} <= {check.name for check in report.checks}
    not_offered = [check.name for check in report.checks if check.state is State.NOT_OFFERED]
    assert not_offered == ["memory"]


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", TO_INT8), ("exact", Tolerance(logits=0))])
def test_plain_numpy_conforms(kind: str, tolerance: Tolerance) -> None:
    options = BackendOptions(kernels=kind)
    few = {"types": ("F16", "Q4_K"), "families": ("phi3",), "kv_types": (), "batches": (1, 7)}
    check_backend(NUMPY, options=options, tolerance=tolerance, **few)  # type: ignore[arg-type]  # each is right


# ---------------------------------------------------------------- faults

F32_KV = (KvType.F32,)


def checked(
    backend: BackendPlugin,
    types: tuple[MatrixType, ...] = (),
    families: tuple[Arch, ...] = (),
    kv_types: tuple[KvType, ...] = (),
    batches: tuple[int, ...] = (),
) -> Report:
    """The report of the checks that always run and of the selected ones, failed or not."""
    try:
        return check_backend(
            backend, tolerance=TO_INT8, types=types, families=families, kv_types=kv_types, batches=batches
        )
    except CheckFailed as failed:
        return failed.report


def failures(report: Report) -> dict[str, str]:
    return {check.name: str(check) for check in report.failures}


def test_the_backend_that_faults_are_put_into_is_sound() -> None:
    assert failures(checked(plugin(), ("Q4_K",), ("llama",), F32_KV, (7,))) == {}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (faults.Appends, "positions are rewritten"),
        (faults.ForgetsDrops, "drop"),
        (faults.DropsOnce, "drop"),
        (faults.AppliesByHalves, "a refused step changes nothing"),
        (faults.RaisesKeyErrors, "a refused step changes nothing"),
        (faults.IgnoresGaps, "a refused step changes nothing"),
        (faults.SharesForks, "forks stay apart"),
        (faults.ShortensEverywhere, "steps in flight"),
        (faults.KeepsTheCapacity, "move"),
        (faults.LosesWhatItCopies, "fork"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_of_kv_is_found(fault: type[NumpyKv], check: str) -> None:
    found = failures(checked(plugin(with_kv(fault)), kv_types=F32_KV))
    assert f"kv f32: {check}" in found
    assert all(name.startswith(("kv f32", "ops attention")) for name in found), found


Selection = tuple[tuple[MatrixType, ...], tuple[Arch, ...]]
NOTHING: Selection = (), ()
DENSE: Selection = ("F32", "Q4_K"), ("llama",)


@pytest.mark.parametrize(
    ("ops", "selection", "checks", "said"),
    [
        (faults.RotatesOtherPairs, DENSE, ["ops rope", "family llama"], "rope"),
        (faults.RotatesWholeHeads, ((), ("phi3",)), ["ops rope", "family phi3"], "24 of 32 elements"),
        (faults.DependsOnTheBatch, NOTHING, ["a chunk of 7", "7 sequences together"], "the bits of those alone"),
        (faults.LosesLongChunks, NOTHING, ["a chunk of 64", "64 sequences together"], "logits"),
        (faults.MisreadsQ4K, DENSE, ["ops matrix Q4_K", "type Q4_K"], "Q4_K"),
        (faults.ForgetsBiases, ((), ("qwen2",)), ["ops linears", "family qwen2"], "linears"),
        (faults.SeesBeyondTheWindow, ((), ("gemma2",)), ["ops attention with a window", "family gemma2"], "window=35"),
        (faults.TakesTheLastOfTies, NOTHING, ["ops mixture of ties"], "equal scores"),
        (faults.CopiesNothing, NOTHING, ["a store that streams: experts"], "logits from a store that streams"),
        (faults.RefillsNothing, NOTHING, ["a store that streams: fused maps"], "logits from a store that streams"),
        (faults.AddsInPlace, NOTHING, ["ops add"], "only y may be reused"),
        (faults.GivesItsBuffer, NOTHING, ["ops from_host and to_host", "arrays handed out"], "to stay as it is"),
        (faults.OverflowsInGelu, NOTHING, ["ops geglu"], "not finite"),
        (faults.ForgetsWhatItAddsTo, NOTHING, ["ops fused operations"], "added_linear of 1"),
        (faults.ForgetsTheFusedNorm, NOTHING, ["ops fused operations"], "normed_linears of 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_an_operation_is_found(
    ops: type[faults.Ops], selection: Selection, checks: list[str], said: str
) -> None:
    found = failures(checked(plugin(with_ops(ops)), *selection, batches=(7, 64)))
    assert set(checks) <= set(found)
    assert said in found[checks[0]]


@pytest.mark.parametrize(
    ("shard", "check", "said"),
    [
        (faults.WritesToItsInput, "arrays taken in", "it belongs to the caller"),
        (faults.WantsToWriteItsInput, "arrays taken in", "read-only"),
        (faults.GivesFloat64, "arrays handed out", "float64"),
        (faults.SortsRows, "rows of logits", "logits of rows [4, 0, 4]"),
        (faults.TakesAnyToken, "wrong input", "FrameError for token id -1"),
        (faults.TakesAnyShape, "wrong input", "an activation of too few rows"),
        (faults.CountsLayersFromItsOwnFirst, "layers cut: two shards", "layers go by their numbers"),
        (faults.LivesAfterClose, "close of a shard", "PlanError for embed after close"),
        (faults.ClosesOnce, "close of a shard", "RuntimeError: it is closed"),
        (faults.HasAllParts, "ends of the model", "PlanError for embed without the input part"),
        (faults.BindsOnce, "a store that streams: llama", "logits from a store that streams"),
        (faults.KeepsLayers, "a store that streams: llama", "every acquired layer to be released"),
        (faults.SkipsAnEmptyStep, "kv f32: steps without tokens", "is not open"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_a_shard_is_found(shard: type[faults.OneShard], check: str, said: str) -> None:
    found = failures(checked(plugin(with_shard(shard)), kv_types=F32_KV if check.startswith("kv") else ()))
    assert said in found[check]


@pytest.mark.parametrize(
    ("offer", "check", "said"),
    [
        (plugin(name="Numpy"), "descriptor", "'Numpy'"),
        (plugin(name="auto"), "descriptor", "'auto'"),
        (plugin(api=2), "descriptor", "write api=1 yourself"),
        (plugin(probe=faults.raising), "probe", "ImportError: libdevice.so is missing"),
        (plugin(probe=faults.speechless), "probe", "a reason and a hint"),
        (plugin(faults.TakesAnyKernels), "options", "ConfigError for kernels='no-such-kernels'"),
        (plugin(faults.CannotOpen), "open", "OSError: libdevice.so is missing"),
        (plugin(faults.NamesNoBackend), "devices", "numpy:cpu"),
        (plugin(faults.HasNoMemory), "devices", "a positive int"),
        (plugin(faults.GrowsUnknownTypes), "devices", "'q4_k'"),
        (plugin(faults.TakesAnyDevice), "unknown device", "numpy:cpu99"),
        (plugin(faults.CountsNoKv), "memory", "check_fits"),
        (plugin(faults.MiscountsWhatFits), "memory", "no layer would fit"),
        (plugin(faults.DescribesByNumbers), "describe", "facts that are strings"),
    ],
    ids=lambda value: getattr(getattr(value, "open", None), "__name__", ""),
)
def test_a_fault_of_the_offer_is_found(offer: BackendPlugin, check: str, said: str) -> None:
    assert said in failures(checked(offer))[check]


# ---------------------------------------------------------------- what is not offered, and what is reported


def test_a_refused_type_is_not_offered_and_no_failure() -> None:
    report = checked(plugin(with_ops(faults.RefusesQ4K)), ("F32", "Q4_K"))
    assert report.failures == ()
    states = {check.name: check for check in report.checks}
    assert states["type F32"].state is State.OK
    assert states["type Q4_K"].state is states["ops matrix Q4_K"].state is State.NOT_OFFERED
    assert "Q4_K is not for this device" in states["type Q4_K"].reason


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (MAX_GROWTH, True), (0.5, False), (MAX_GROWTH + 1, False)])
def test_growth_is_what_prima_lets_in(factor: float, right: bool) -> None:
    class Grows(faults.Faulty):
        def devices(self) -> list[Device]:
            return [replace(device, growth={"Q4_K": factor}) for device in super().devices()]

    assert ("devices" not in failures(checked(plugin(Grows)))) == right


def test_float16_kv_is_no_choice() -> None:
    found = failures(checked(plugin(faults.LacksFloat16Kv), kv_types=(KvType.F16, KvType.F32)))
    assert list(found) == ["kv f16"]


def test_batches_may_differ_by_the_stated_tolerance() -> None:
    backend = plugin(with_ops(faults.DependsOnTheBatch))
    report = check_backend(backend, tolerance=Tolerance(1e-3, 0.1, batch=0.05), types=(), families=(), kv_types=())
    [chunk] = [check for check in report.checks if check.name == "a chunk of 64"]
    assert 1e-6 < float(chunk.figures["batch"]) < 0.05


def test_all_that_failed_is_raised_in_one_readable_error() -> None:
    with pytest.raises(CheckFailed) as raised:
        check_backend(plugin(faults.HasNoMemory), types=(), families=(), kv_types=())
    text = str(raised.value)
    assert text.startswith("backend numpy: 1 of 7 checks failed\ndevices\n  expected: ")
    assert "\n  came:     0\n  hint:     a positive int" in text
    assert raised.value.failures == raised.value.report.failures


def test_a_report_is_a_table_and_json() -> None:
    report = checked(plugin(with_ops(faults.RefusesQ4K)), ("F32", "Q4_K"))
    table = str(report)
    assert table.startswith("backend numpy on numpy:cpu: ")
    assert " 3 not offered, 0 failed\n" in table
    [row] = [line for line in table.splitlines() if line.startswith("  type F32 ")]
    assert "ok           error " in row
    assert "greedy 6 of 6, batch bit-equal" in row
    states = {check["name"]: check["state"] for check in json.loads(report.to_json())["checks"]}
    assert states["type Q4_K"] == "not offered"


# ---------------------------------------------------------------- how it is called


def test_all_calls_come_from_one_thread_that_is_not_the_main_one() -> None:
    threads = set()

    class Watched(faults.Faulty):
        def __getattribute__(self, name: str) -> object:
            threads.add(threading.current_thread())
            return super().__getattribute__(name)

    check_backend(plugin(Watched), tolerance=TO_INT8, types=(), families=(), kv_types=())
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_open_alone_can_be_checked() -> None:
    report = check_backend(faults.Faulty, tolerance=TO_INT8, types=(), families=(), kv_types=())
    assert report.subject == "backend numpy on numpy:cpu"


def test_a_backend_that_says_it_is_not_usable_here_is_not_checked() -> None:
    offer = plugin(probe=lambda: Probe(False, "no driver", "install it"))
    with pytest.raises(PluginError, match=r"not usable here: no driver \(install it\)"):
        check_backend(offer)


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"no device 'numpy:gpu' \(there are: numpy:cpu\)"):
        check_backend(plugin(), device="numpy:gpu")


def test_the_first_device_is_checked_or_the_one_that_is_asked_for() -> None:
    class Two(faults.Faulty):
        def devices(self) -> list[Device]:
            return [Device("numpy:made-up", 1 << 30), *super().devices()]

    found = failures(checked(plugin(Two)))
    assert "PluginError: backend 'numpy' has no device 'numpy:made-up'" in found["ops"]
    assert "wrong input" in found
    report = check_backend(plugin(Two), device="numpy:cpu", tolerance=TO_INT8, types=(), families=(), kv_types=())
    assert report.subject == "backend numpy on numpy:cpu"


def test_a_backend_need_not_offer_ops() -> None:
    class ShardsOnly:
        """No subclass: `ops` is no part of the Protocol."""

        def __init__(self, options: BackendOptions) -> None:
            self._backend = faults.Faulty(options)
            self.devices, self.describe = self._backend.devices, self._backend.describe
            self.load, self.close = self._backend.load, self._backend.close

    report = check_backend(ShardsOnly, tolerance=TO_INT8, types=("F32",), families=(), kv_types=())
    states = {check.name: check.state for check in report.checks}
    assert states["ops"] is State.NOT_OFFERED
    assert "ops rope" not in states
    assert states["type F32"] is State.OK


def test_without_gguf_the_kit_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf \(pip install \"prima-llm\[testing\]\"\)"):
        check_backend(NUMPY)


def test_a_broken_backend_is_closed() -> None:
    closed: list[Backend] = []

    class Closes(faults.HasNoMemory):
        def close(self) -> None:
            closed.append(self)

    checked(plugin(Closes))
    assert len(closed) == 1
