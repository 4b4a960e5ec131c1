"""The numpy backend, in each kind of kernels, does what the kit asks of every backend."""

from __future__ import annotations

import pytest

from prima_core.interfaces import BackendOptions
from prima_core.testing.checks import State, Tolerance, check_backend
from prima_core.testing.examples import ARCHS, TYPES
from prima_numpy.plugin import prima_backends

[NUMPY] = prima_backends()
TO_INT8 = Tolerance(logits=1e-5, blocks=0.1)


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
