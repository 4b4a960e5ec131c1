"""Offers torch as a backend."""

from __future__ import annotations

from collections.abc import Iterable

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> Iterable[BackendPlugin]:
    yield BackendPlugin(name="torch", api=1, probe=_probe, open=_open, extra="torch")


def _probe() -> Probe:
    """Usable wherever torch is; what keeps it from a GPU is said."""
    from prima_torch.support import look

    support = look()
    if support is None:
        return Probe(usable=False, reason="torch is not installed", hint='pip install "prima-llm[torch]"')
    if support.fault:
        return Probe(usable=True, reason=f"on the CPU only: {support.fault}", hint=support.hint, cpu_only=True)
    reason, slow = f"CUDA {support.describe()}", support.triton_fault
    if slow:
        reason += f"; slower than it could be: {slow}"
    return Probe(usable=True, reason=reason, hint="see NVIDIA's GPUs in docs/operations.md" if slow else "")


def _open(options: BackendOptions) -> Backend:
    from prima_torch.backend import TorchBackend

    return TorchBackend(options)
