"""The kit for authors of backends finds nothing wrong."""

from __future__ import annotations

from prima_core.interfaces import BackendOptions
from prima_core.testing.checks import Tolerance, check_backend
from prima_core.testing.tinymodel import MatrixType
from prima_torch.plugin import prima_backends

TYPES: tuple[MatrixType, ...] = ("F32", "BF16", "Q8_0", "Q4_K", "IQ2_XS", "MXFP4")
"""`test_unpack.py` has all of them."""


def test_the_backend_conforms() -> None:
    [plugin] = prima_backends()
    options = BackendOptions(threads=1)
    check_backend(plugin, device="torch:cpu", options=options, tolerance=Tolerance(batch=1e-5), types=TYPES)
