"""Offers the backend `float64`."""

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Backend, BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> list[BackendPlugin]:
    return [BackendPlugin(name="float64", api=1, probe=_probe, open=_open)]


def _probe() -> Probe:
    return Probe(usable=True, reason="needs nothing but numpy", cpu_only=True)


def _open(options: BackendOptions) -> Backend:
    from prima_example_backend.backend import Float64Backend  # here: a plugin module stays light

    return Float64Backend(options)
