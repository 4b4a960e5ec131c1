"""The kit for authors of backends finds nothing wrong."""

from __future__ import annotations

from prima_core.testing.checks import Tolerance, check_backend
from prima_core.testing.tinymodel import MatrixType
from prima_mlx.plugin import prima_backends

TYPES: tuple[MatrixType, ...] = ("F32", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "MXFP4")


def test_the_backend_conforms() -> None:
    [plugin] = prima_backends()
    check_backend(plugin, tolerance=Tolerance(batch=1e-5), types=TYPES)
