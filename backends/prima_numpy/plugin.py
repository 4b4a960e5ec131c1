"""Offers the host's processor as a backend."""

from __future__ import annotations

from collections.abc import Iterable

from prima_core.errors import PrimaError
from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> Iterable[BackendPlugin]:
    yield BackendPlugin(name="numpy", api=1, probe=_probe, open=_open)


def _probe() -> Probe:
    """A missing native module is said, because it costs two orders of magnitude."""
    from prima_numpy.native_module import native_fault

    fault = native_fault()
    if fault:
        return Probe(usable=True, reason=fault, hint="install a C++ compiler, then prima-llm again")
    from prima_numpy.variants import summary

    try:
        return Probe(usable=True, reason=summary())
    except PrimaError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint, wrong_setting=True)


def _open(options: BackendOptions) -> Backend:
    from prima_numpy.backend import NumpyBackend

    return NumpyBackend(options)
