"""Offers MLX: the GPU of Apple silicon, and elsewhere the CPU, to try things out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> Iterable[BackendPlugin]:
    yield BackendPlugin(name="mlx", api=1, probe=probe, open=_open, extra=_extra())


def probe() -> Probe:
    hint = f'pip install "prima-llm[{_extra()}]"'
    mlx = find_spec("mlx")
    if mlx is None:
        return Probe(usable=False, reason="mlx is not installed", hint=hint)
    folders = [Path(folder) for folder in mlx.submodule_search_locations or ()]
    if sys.platform != "win32" and not [lib for folder in folders for lib in folder.glob("lib/libmlx.*")]:
        # The package `mlx` alone is the front: what computes comes as mlx-metal, mlx-cpu or mlx-cuda.
        return Probe(usable=False, reason="mlx is installed, but none of its libraries that compute", hint=hint)
    has_cpu_build = any(distributions(name="mlx-cpu"))
    return Probe(usable=True, reason="mlx is installed", cpu_only=has_cpu_build)


def _extra() -> str:
    is_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_apple_silicon else "mlx-cpu"


def _open(options: BackendOptions) -> Backend:
    from prima_mlx.backend import MlxBackend

    return MlxBackend(options)
