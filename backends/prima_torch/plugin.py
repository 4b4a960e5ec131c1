"""Offers the torch backend. Its compute part comes in a later version; until then it says so."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NoReturn

from prima_core.errors import PluginError
from prima_core.hookspecs import hookimpl
from prima_core.interfaces import BackendOptions, BackendPlugin, Probe


@hookimpl
def prima_backends() -> list[BackendPlugin]:
    return [BackendPlugin(name="torch", api=1, probe=probe, open=open_backend, extra="torch")]


def probe() -> Probe:
    if find_spec("torch") is None:
        return Probe(usable=False, reason="torch is not installed", hint='pip install "prima-llm[torch]"')
    reason = "torch is installed, but this version of prima has no torch backend yet"
    return Probe(usable=False, reason=reason, hint="use --backend numpy")


def open_backend(options: BackendOptions) -> NoReturn:
    raise PluginError(f"backend 'torch' is not usable: {probe().reason}", hint=probe().hint)
