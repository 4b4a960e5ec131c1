"""`prima plan`, `tokenize`, `plugins` and `doctor`: commands that look and tell, and change nothing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import rich_click as click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prima_core.commands.setup import Settings, head_options, model_path, open_model_argument, token_path
from prima_core.errors import ConfigError, ModelError, PrimaError
from prima_core.interfaces import BackendOptions
from prima_core.model.gguf import GGUFFile
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.weights import open_model
from prima_core.node.coordinate import Planning, model_facts
from prima_core.node.driver import Member
from prima_core.node.head import DEFAULT_CONTEXT
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, plan_to_json
from prima_core.plan.problem import problem_from_json
from prima_core.plugins import PluginState, Registry

# ---------------------------------------------------------------- prima plan


def plan(model: str | None, problem: str | None, as_json: bool, settings: Settings) -> None:
    """Print the plan that `prima serve` would make on this machine, or that solves a problem file."""
    registry = Registry.load(os.environ)
    made = _solve_file(problem, registry, settings) if problem is not None else _own_plan(model, registry, settings)
    if as_json:
        click.echo(plan_to_json(made).decode())
        return
    table = Table("visit", "node", "layers", "weights and KV")
    sizes = {need.node: f"{need.weight_bytes / 1e6:,.0f} + {need.kv_bytes / 1e6:,.0f} MB" for need in made.residency}
    for index, visit in enumerate(made.visits):
        table.add_row(str(index), visit.node, f"[{visit.start}, {visit.stop})", sizes.pop(visit.node, ""))
    _wide_console().print(table)
    click.echo(f"solver {made.solver or 'none'}, {made.kv_tokens} KV positions, {made.credit} steps in flight")


def _wide_console() -> Console:
    """Tables into a pipe or a file are not folded to 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _solve_file(path: str, registry: Registry, settings: Settings) -> Plan:
    try:
        problem = problem_from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the problem {path}: {error.strerror}", hint="check --problem") from error
    return complete(registry.solver(settings["solver"]).solve(problem), problem)


def _own_plan(model: str | None, registry: Registry, settings: Settings) -> Plan:
    with open_model_argument(model) as opened:
        options = head_options(settings, opened.file.metadata)
        backend, _ = registry.open_backend(options.node.backend, BackendOptions(kernels=options.node.kernels), None)
        devices = tuple(device.id for device in backend.devices())
        backend.close()
        names = [options.name, *(f"{options.name}.{index}" for index in range(2, options.n_local + 2))]
        members = tuple(Member(name, options.node.memory, devices, "") for name in names)
        context = min(options.context or DEFAULT_CONTEXT, opened.spec.context_length)
        solve = registry.solver(options.solver).solve
        return Planning(model_facts(opened, context), options.name, options.parallel, solve, options.plan)(members)


# ---------------------------------------------------------------- prima tokenize


def tokenize(model: str, text: str | None, special: bool, as_json: bool) -> None:
    """Print the token ids and pieces of a text; standard input where TEXT is absent."""
    if text is None:
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    with GGUFFile.open(model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(text, add_special=special, parse_special=special)
    if as_json:
        click.echo(msgspec.json.encode({"ids": ids, "pieces": tokenizer.pieces(ids)}).decode())
        return
    for id_, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        click.echo(f"{id_:>8} {piece!r}")


# ---------------------------------------------------------------- prima plugins


def plugins(as_json: bool) -> None:
    """Print every plugin that was found, also broken ones."""
    rows = Registry.load(os.environ).report()
    if as_json:
        click.echo(msgspec.json.encode([asdict(row) for row in rows]).decode())
        return
    table = Table("name", "distribution", "version", "state", "offers", "fault", "hint")
    for row in rows:
        cells = (row.name, row.distribution, row.version, row.state.value, ", ".join(row.offers), row.fault, row.hint)
        table.add_row(*map(escape, cells))
    _wide_console().print(table)


# ---------------------------------------------------------------- prima doctor


@dataclass(frozen=True, slots=True)
class Finding:
    """Something on this machine: whether it works, what it is, and how to get what is missing."""

    topic: str
    ok: bool
    fact: str
    hint: str = ""


def doctor(as_json: bool) -> None:
    """Print what works on this machine, what is missing, and how to get it."""
    findings = list(_findings())
    if as_json:
        click.echo(msgspec.json.encode([asdict(finding) for finding in findings]).decode())
        return
    table = Table("", "what", "finding", "what to do")
    for finding in findings:
        table.add_row("ok" if finding.ok else "--", *map(escape, (finding.topic, finding.fact, finding.hint)))
    _wide_console().print(table)


def _findings() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("prima", True, version("prima-llm"))
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("memory", True, f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")
    registry = Registry.load(os.environ)
    yield from _plugin_findings(registry)
    yield from _backend_findings(registry)
    yield _builtin_finding()
    token = token_path()
    fact = "is there" if token.exists() else "not made yet; `prima serve --listen` makes it"
    yield Finding("cluster token", True, f"{token}: {fact}")


def _plugin_findings(registry: Registry) -> Iterator[Finding]:
    for row in registry.report():
        ok = row.state is PluginState.OK
        yield Finding(f"plugin {row.name}", ok, row.fault or ", ".join(row.offers), row.hint)


def _backend_findings(registry: Registry) -> Iterator[Finding]:
    """What `--backend auto` would take here, and what that backend tells about itself."""
    try:
        backend, why = registry.open_backend("auto", BackendOptions(), None)
    except PrimaError as error:
        yield Finding("backend auto", False, error.message, error.hint)
        return
    yield Finding("backend auto", True, why)
    for name, fact in backend.describe().items():
        yield Finding(f"backend {name}", True, fact)
    for device in backend.devices():
        yield Finding(f"device {device.id}", True, f"{device.memory_bytes / 1e9:.1f} GB {device.summary}")
    backend.close()


def _builtin_finding() -> Finding:
    try:
        with model_path(None) as path, open_model(path) as model:
            return Finding("built-in model", True, f"{model.spec.n_layers} layers, {path.stat().st_size / 1e6:.1f} MB")
    except ModelError as error:
        return Finding("built-in model", False, error.message, "install prima-llm again")
