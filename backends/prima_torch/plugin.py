"""Offers torch as a backend."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> Iterable[BackendPlugin]:
    yield BackendPlugin(name="torch", api=1, probe=_probe, open=_open, extra="torch")


def _probe() -> Probe:
    """Usable wherever torch is; what keeps it from a GPU is said."""
    if find_spec("torch") is None:
        return Probe(usable=False, reason="torch is not installed", hint='pip install "prima-llm[torch]"')
    try:
        from prima_torch.support import cuda_fault, cuda_hint
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's is missing
        return Probe(usable=False, reason=f"torch cannot be imported: {error}", hint="install torch again")
    fault = cuda_fault()
    if not fault:
        return Probe(usable=True, reason="a GPU is there")
    return Probe(usable=True, reason=f"on the CPU only: {fault}", hint=cuda_hint(fault))


def _open(options: BackendOptions) -> Backend:
    from prima_torch.backend import TorchBackend

    return TorchBackend(options)
