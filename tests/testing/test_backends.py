"""The numpy backend does what the kit asks of every backend, and faults are found by the check that names them."""

from __future__ import annotations

import pytest

from prima_core.interfaces import BackendOptions, BackendPlugin, KvType
from prima_core.testing.checks import CheckFailed, Report, State, Tolerance, check_backend
from prima_core.testing.examples import ARCHS, TYPES
from prima_core.testing.tinymodel import Arch, MatrixType
from prima_numpy.plugin import prima_backends
from tests.testing import faults
from tests.testing.faults import plugin, with_kv

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
    check_backend(NUMPY, options=options, tolerance=tolerance, types=("F16", "Q4_K"), families=("phi3",), kv_types=())


# ---------------------------------------------------------------- faults

F32_KV = (KvType.F32,)


def checked(
    backend: BackendPlugin,
    types: tuple[MatrixType, ...] = (),
    families: tuple[Arch, ...] = (),
    kv_types: tuple[KvType, ...] = (),
) -> Report:
    """The report of the checks that always run and of the selected ones, failed or not."""
    try:
        return check_backend(backend, tolerance=TO_INT8, types=types, families=families, kv_types=kv_types)
    except CheckFailed as failed:
        return failed.report


def failures(report: Report) -> dict[str, str]:
    return {check.name: str(check) for check in report.failures}


def test_the_backend_that_faults_are_put_into_is_sound() -> None:
    assert failures(checked(plugin(), ("Q4_K",), ("llama",), F32_KV)) == {}


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
        (faults.TruncatesEverywhere, "steps in flight"),
        (faults.KeepsTheCapacity, "move"),
        (faults.LosesWhatItCopies, "fork"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_of_kv_is_found(fault: type[faults.NumpyKv], check: str) -> None:
    found = failures(checked(plugin(with_kv(fault)), kv_types=F32_KV))
    assert f"kv f32: {check}" in found
    assert all(name.startswith("kv f32") for name in found), found
