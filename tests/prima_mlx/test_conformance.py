"""The kit for authors of backends finds nothing wrong."""

from __future__ import annotations

import pytest

from prima_core.interfaces import KvType
from prima_core.testing.checks import Tolerance, check_backend
from prima_core.testing.examples import ARCHS
from prima_core.testing.tinymodel import Arch, MatrixType
from prima_mlx.plugin import prima_backends

TYPES: tuple[MatrixType, ...] = ("F32", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "MXFP4")
"""`test_quant.py` has all of them."""


@pytest.mark.parametrize(
    ("types", "families", "kv_types"),
    [(TYPES, (), ()), ((), ARCHS, ()), ((), (), tuple(KvType))],
    ids=["types", "families", "KV"],
)
def test_the_backend_conforms(
    types: tuple[MatrixType, ...], families: tuple[Arch, ...], kv_types: tuple[KvType, ...]
) -> None:
    [plugin] = prima_backends()
    check_backend(plugin, tolerance=Tolerance(batch=1e-5), types=types, families=families, kv_types=kv_types)
