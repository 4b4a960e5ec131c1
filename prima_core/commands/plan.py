"""`prima plan`: who would compute what."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.markup import escape
from rich.table import Table

from prima_core.commands.setup import Settings, head_options, open_model_argument
from prima_core.commands.table import wide_console
from prima_core.errors import ConfigError
from prima_core.interfaces import BackendOptions
from prima_core.node.coordinate import Planning, model_facts
from prima_core.node.driver import Member
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, plan_to_json
from prima_core.plan.problem import DeviceFacts, problem_from_json
from prima_core.plugins import Registry


def plan(model: str | None, problem: str | None, as_json: bool, settings: Settings, registry: Registry) -> None:
    """Print the plan that `prima serve` would make on this machine, or that solves a problem file."""
    made = _solve_file(problem, registry, settings) if problem is not None else _own_plan(model, registry, settings)
    if as_json:
        click.echo(plan_to_json(made).decode())
        return
    wide_console().print(_table(made))
    kv = f"{made.kv_tokens} KV positions in {made.kv_type}, contexts of {made.context}"
    click.echo(f"solver {made.solver or 'none'}, {kv}, {made.credit} steps in flight")


def _table(made: Plan) -> Table:
    """A row for each visit and device; the bytes are all that the plan takes there, where it comes first."""
    table = Table("visit", "node", "device", "layers", "weights and KV")
    needs = {(need.node, need.device): need for need in made.residency}
    firsts = {need.node: need.device for need in reversed(made.residency)}
    for index, visit in enumerate(made.visits):
        for part in visit.parts(firsts[visit.node]):
            need = needs.pop((visit.node, part.device), None)
            size = f"{need.weight_bytes / 1e6:,.0f} + {need.kv_bytes / 1e6:,.0f} MB" if need else ""
            table.add_row(*map(escape, (str(index), visit.node, part.device, f"[{part.start}, {part.stop})", size)))
    return table


def _solve_file(path: str, registry: Registry, settings: Settings) -> Plan:
    try:
        problem = problem_from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the problem {path}: {error.strerror}", hint="check --problem") from error
    return complete(registry.solver(settings["solver"]).solve(problem), problem)


def _own_plan(model: str | None, registry: Registry, settings: Settings) -> Plan:
    with open_model_argument(model, settings) as opened:
        options = head_options(settings, opened.file.metadata)
        backend, _ = registry.open_backend(options.node.backend, BackendOptions(kernels=options.node.kernels), None)
        devices = tuple(DeviceFacts.of(device) for device in backend.devices())
        backend.close()
        names = [options.name, *(f"{options.name}.{index}" for index in range(2, options.n_local + 2))]
        members = tuple(Member(name, options.node.memory, devices, "") for name in names)
        facts = model_facts(opened, options.context, options.kv_type, options.plan)
        solve = registry.solver(options.solver).solve
        return Planning(facts, options.name, options.parallel, solve, options.plan)(members)
