"""Offers the host's processor as a backend."""

from __future__ import annotations

from collections.abc import Iterable

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> Iterable[BackendPlugin]:
    yield BackendPlugin(name="numpy", api=1, probe=_probe, open=_open)


def _probe() -> Probe:
    return Probe(usable=True, reason="needs nothing but numpy")


def _open(options: BackendOptions) -> Backend:
    from prima_numpy.backend import NumpyBackend

    return NumpyBackend(options)
