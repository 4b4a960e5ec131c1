"""`prima plan`: who would compute what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import msgspec
import rich_click as click
from rich.markup import escape
from rich.table import Table

from prima_core.commands.asked import Given, asked, check_asked
from prima_core.commands.explain import explained, print_explained, write_svg
from prima_core.commands.setup import Settings, head_options, open_model_argument, plan_of_file
from prima_core.commands.table import wide_console
from prima_core.errors import ConfigError, PlanError
from prima_core.interfaces import BackendOptions, Goal
from prima_core.model.visible import visible
from prima_core.node.coordinate import Planning, foretold, model_facts
from prima_core.node.member import Member
from prima_core.node.profiles import Profiles, cache_folder
from prima_core.node.profiling import kept_profile
from prima_core.plan.check import complete
from prima_core.plan.cures import with_cures
from prima_core.plan.explain import Solve
from prima_core.plan.forecast import Forecast
from prima_core.plan.guess import vouched, with_guesses
from prima_core.plan.plan import Certificate, Plan, Residency, plan_to_json
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, Problem, problem_from_json
from prima_core.plan.profile import Profile
from prima_core.plan.words import WHAT, duration, guesses, left_out
from prima_core.plugins import Registry

LOCAL_LINK = LinkFacts(latency_s=60e-6, bytes_s=4e9)
"""Between processes of a machine, about: unix sockets by `python bench/links.py`. A server measures its own."""


@dataclass(frozen=True, slots=True)
class Shown:
    """How a plan is told: `explains` in words and bars, with what would help; `svg`: a file for a picture."""

    as_json: bool = False
    explains: bool = False
    svg: str | None = None


def plan(
    model: str | None, problem: str | None, shown: Shown, settings: Settings, given: Given, registry: Registry
) -> None:
    """Print the plan that `prima serve` would make on this machine, or that solves a problem file."""
    if problem is not None:
        solved = _solve_file(model, problem, registry, settings, given)
    else:
        solved = _own_plan(model, registry, settings)
    made = foretold(solved.plan, solved.problem)
    if shown.svg is not None and made.forecast is None:
        raise PlanError(_unknown(made, solved.problem), hint=solved.cure.removeprefix("; "))
    made = explained(made, solved.problem, solved.solve if shown.explains else None, solved.guesses)
    if shown.svg is not None:
        write_svg(shown.svg, made, solved.problem)
    if shown.as_json:
        click.echo(plan_to_json(made).decode())
        return
    if shown.explains:
        print_explained(made, solved.problem)
    else:
        _print(made)
    if made.forecast is None and (shown.explains or any(need.streamed_bytes for need in made.residency)):
        click.echo(f"{_unknown(made, solved.problem)}{solved.cure}")
    if made.certificate is not None:
        click.echo(_vouched(made.certificate, solved.problem.goal))


def _print(made: Plan) -> None:
    console = wide_console()
    console.print(_table(made))
    kv = f"{made.kv_tokens} KV positions in {made.kv_type}, contexts of {made.context}"
    click.echo(f"solver {made.solver or 'none'}, {kv}, {made.credit} steps in flight")
    if made.forecast is not None:
        console.print(_forecast_table(made.forecast))
        click.echo(_told(made.forecast))
    if made.output:
        click.echo(visible(f"the output part is on {made.output}, the logits go from there to {made.head}"))
    for sentence in (*left_out(made), *guesses(made)):
        click.echo(visible(sentence))


def _vouched(certificate: Certificate, goal: Goal) -> str:
    least = f"no plan is foretold less than {duration(certificate.bound_s)} for {WHAT[goal]}: "
    return f"{least if certificate.bound_s else ''}{certificate.about}"


def _unknown(made: Plan, problem: Problem) -> str:
    """Why there is no forecast."""
    try:
        predict(made, problem)
    except PlanError as error:
        return error.message
    return ""


def _table(made: Plan) -> Table:
    """A row for each visit and device; the bytes are all that the plan takes there, where it comes first."""
    streams = any(need.streamed_bytes for need in made.residency)
    table = Table("visit", "node", "device", "layers", "weights and KV", *(_STREAMING if streams else ()))
    needs = {(need.node, need.device): need for need in made.residency}
    firsts = {need.node: need.device for need in reversed(made.residency)}
    for index, visit in enumerate(made.visits):
        for part in visit.parts(firsts[visit.node]):
            need = needs.pop((visit.node, part.device), None)
            row = (str(index), visit.node, part.device, f"[{part.start}, {part.stop})", *_bytes_of(need, streams))
            table.add_row(*map(escape, row))
    for need in needs.values():  # ends of the model on a device without layers
        table.add_row(*map(escape, ("", need.node, need.device, "", *_bytes_of(need, streams))))
    return table


_STREAMING = (
    "stays (+ in the host's memory)",
    "from disk for every token",
    "buffer (+ slots on a device that copies)",
)


def _bytes_of(need: Residency | None, streams: bool) -> tuple[str, ...]:
    if need is None:
        return ("",) * (4 if streams else 1)
    buffer = f"{_mb(need.buffer_bytes)}" + (f" + {_mb(need.slot_bytes)}" if need.slot_bytes else "")
    stays = _mb(need.pinned_bytes) + (f" + {_mb(need.host_bytes)}" if need.host_bytes else "")
    rows = "" if need.buffer_bytes or not need.disk_bytes else ", only the rows of its tokens"
    sizes = (f"{stays} MB", f"{_mb(need.disk_bytes)} MB{rows}", f"{buffer} MB") if streams else ()
    return f"{_mb(need.weight_bytes)} + {_mb(need.kv_bytes)} MB", *sizes


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f}"


def _forecast_table(forecast: Forecast) -> Table:
    table = Table("node", "computes", "waits for its disk", "links", "reads")
    for node in forecast.nodes:
        times = (f"{1e3 * time_s:,.1f} ms" for time_s in (node.compute_s, node.stall_s, node.link_s))
        table.add_row(escape(node.node), *times, f"{_mb(node.read_bytes)} MB")
    return table


def _told(forecast: Forecast) -> str:
    first = f", {forecast.prompt_s:.3g} s to the first of {forecast.n_prompt}" if forecast.prompt_s is not None else ""
    each = "" if forecast.width == 1 else f" of each of {forecast.width} sequences, {forecast.tokens_s:.3g} tokens/s"
    return (
        f"foretold: {1e3 * forecast.token_s:,.1f} ms per token{each} (with perfectly even visits"
        f" {1e3 * forecast.bound_s:,.1f}){first}; most of it is {forecast.limit}"
    )


@dataclass(frozen=True, slots=True)
class _Solved:
    """A completed plan for a problem; `solve`: what made it, None: it was given. `guesses`: of rates that were not
    known. `cure`: where rates come from."""

    plan: Plan
    problem: Problem
    solve: Solve | None
    guesses: tuple[str, ...]
    cure: str = "; state it in the problem"


def _solve_file(model: str | None, path: str, registry: Registry, settings: Settings, given: Given) -> _Solved:
    """By a solver, or as a plan file says."""
    try:
        stated = problem_from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the problem {path}: {error.strerror}", hint="check --problem") from error
    check_asked(model, given, path)
    problem, guessed = with_guesses(asked(stated, settings, given))
    fixed = plan_of_file(settings["plan"])
    if fixed is not None:
        return _Solved(complete(fixed, problem), problem, None, guessed)
    solve = registry.solver(settings["solver"]).solve
    try:
        made = vouched(solve(problem), guessed)
    except PlanError as error:
        raise with_cures(problem, error) from error
    return _Solved(complete(made, problem), problem, solve, guessed)


def _own_plan(model: str | None, registry: Registry, settings: Settings) -> _Solved:
    with open_model_argument(model, settings) as opened:
        options = head_options(settings, opened.file.metadata)
        backend, _ = registry.open_backend(options.node.backend, BackendOptions(kernels=options.node.kernels), None)
        found = tuple(backend.devices())
        backend.close()
        kept = kept_profile(Profiles(cache_folder()), found, opened) or Profile()
        devices = tuple(kept.rated(DeviceFacts.of(device)) for device in found)
        names = [options.name, *(f"{options.name}.{index}" for index in range(2, options.n_local + 2))]
        memory, disk = options.node.memory, (kept.disk_bytes_s, kept.disk)
        links = tuple(
            msgspec.structs.replace(LOCAL_LINK, source=one, target=other) for one, other in permutations(names, 2)
        )
        members = tuple(Member(name, memory, devices, "", *disk, links, kept.random_bytes_s) for name in names)
        facts = model_facts(opened, options.context, options.kv_type, options.plan)
        solve = registry.solver(options.solver).solve
        planning = Planning(
            facts, options.name, options.parallel, solve, options.plan, options.rounds, options.goal, options.n_prompt
        )
        made = planning(members)
        free = None if options.plan is not None else solve
        problem, guessed = planning.solved(made, members), planning.guesses(members)
        return _Solved(made, problem, free, guessed, "; `prima profile` finds it out")
