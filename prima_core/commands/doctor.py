"""`prima doctor`: what works on this machine, what is missing, and how to get it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version

import msgspec
import psutil
import rich_click as click
from rich.markup import escape
from rich.table import Table

from prima_core.arch.families import open_model
from prima_core.commands.setup import model_path, token_path
from prima_core.commands.table import wide_console
from prima_core.errors import ModelError, PrimaError
from prima_core.interfaces import BackendOptions, Device
from prima_core.plugins import PluginState, Registry


@dataclass(frozen=True, slots=True)
class Finding:
    """Something on this machine: whether it works, what it is, and how to get what is missing."""

    topic: str
    ok: bool
    fact: str
    hint: str = ""


def doctor(as_json: bool, registry: Registry) -> None:
    """Print what works on this machine, what is missing, and how to get it."""
    findings = list(_findings(registry))
    if as_json:
        click.echo(msgspec.json.encode([asdict(finding) for finding in findings]).decode())
        return
    table = Table("", "what", "finding", "what to do")
    for finding in findings:
        table.add_row("ok" if finding.ok else "--", *map(escape, (finding.topic, finding.fact, finding.hint)))
    wide_console().print(table)


def _findings(registry: Registry) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("prima", True, version("prima-llm"))
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("memory", True, f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")
    yield from _plugin_findings(registry)
    yield from _backend_findings(registry)
    yield _builtin_finding()
    token = token_path()
    fact = "is there" if token.exists() else "not made yet; `prima serve --listen` makes it"
    yield Finding("cluster token", True, f"{token}: {fact}")


def _plugin_findings(registry: Registry) -> Iterator[Finding]:
    for row in registry.report():
        works = row.state in (PluginState.OK, PluginState.UNUSABLE)  # why a backend is not usable is told below
        if row.state is PluginState.DISABLED:
            yield Finding(f"plugin {row.name}", False, "disabled", "see PRIMA_PLUGINS and PRIMA_DISABLE_PLUGINS")
        else:
            fact = ", ".join(row.offers) if works else row.fault
            yield Finding(f"plugin {row.name}", works, fact, "" if works else row.hint)


def _backend_findings(registry: Registry) -> Iterator[Finding]:
    """Every backend with its devices, and what `--backend auto` would take here."""
    for name in registry.backend_names:
        yield from _one_backend(registry, name)
    try:
        chosen, why = registry.open_backend("auto", BackendOptions(), None)
    except PrimaError as error:
        yield Finding("backend auto", False, error.message, error.hint)
    else:
        chosen.close()
        yield Finding("backend auto", True, why)


def _one_backend(registry: Registry, name: str) -> Iterator[Finding]:
    try:
        opened = registry.open_one(name, BackendOptions())
    except PrimaError as error:
        yield Finding(f"backend {name}", False, error.message, error.hint)
        return
    try:
        probe = registry.backend(name).probe()  # a hint of what works is how it would work better
        facts = [f"{key} {fact}" for key, fact in opened.backend.describe().items()]
        yield Finding(f"backend {name}", True, "; ".join(([probe.reason] if probe.hint else []) + facts), probe.hint)
        yield from map(_device_finding, opened.devices)
    finally:
        registry.close_one(name, opened.backend)


def _device_finding(device: Device) -> Finding:
    whose = "the host's" if device.shares_host else "its own"
    fact = f"{device.memory_bytes / 1e9:.1f} GB free of {whose}" + (f"; {device.summary}" if device.summary else "")
    return Finding(f"device {device.id}", True, fact)


def _builtin_finding() -> Finding:
    try:
        with model_path(None) as path, open_model(path) as model:
            return Finding("built-in model", True, f"{model.spec.n_layers} layers, {path.stat().st_size / 1e6:.1f} MB")
    except ModelError as error:
        return Finding("built-in model", False, error.message, "install prima-llm again")
