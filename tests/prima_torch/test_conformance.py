"""The kit for authors of backends finds nothing wrong."""

from __future__ import annotations

import pytest

from prima_core.interfaces import BackendOptions, KvType
from prima_core.testing.checks import Tolerance, check_backend
from prima_core.testing.examples import ARCHS, TYPES
from prima_core.testing.tinymodel import Arch, MatrixType
from prima_torch.plugin import prima_backends


@pytest.mark.parametrize(
    ("types", "families", "kv_types"),
    [(TYPES[::2], (), ()), (TYPES[1::2], (), ()), ((), ARCHS, ()), ((), (), tuple(KvType))],
    ids=["half of the types", "the other half", "families", "KV"],
)
def test_the_backend_conforms(
    types: tuple[MatrixType, ...], families: tuple[Arch, ...], kv_types: tuple[KvType, ...]
) -> None:
    [plugin] = prima_backends()
    check_backend(
        plugin,
        device="torch:cpu",
        options=BackendOptions(threads=1),
        tolerance=Tolerance(batch=1e-5),
        types=types,
        families=families,
        kv_types=kv_types,
    )
