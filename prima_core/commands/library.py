"""`prima pull`, `prima ls` and `prima rm`: the models folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime

import rich_click as click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from prima_core.commands.setup import Settings, console, say
from prima_core.commands.table import wide_console
from prima_core.library import hub
from prima_core.library.candidates import read_hub_name, readable
from prima_core.library.describe import Description, describe
from prima_core.library.folder import entries, find_entry, models_folder, remove, shown_names
from prima_core.model.visible import visible


def pull(text: str, settings: Settings) -> None:
    """Fetch a model from a hub; print what it is called here."""
    name, folder = read_hub_name(text), models_folder(settings["models"])
    with shown_progress(console) as progress:
        model = hub.Hub(os.environ.get("HF_ENDPOINT")).pull(name, folder, progress)
    pulled = find_entry(f"{name.repo}/{model.name}", folder)
    shown = shown_names(entries(folder))[pulled]
    fault = describe(pulled, shown).fault
    if fault is not None:
        say(f"it cannot be served by this version of prima: {fault}")
    click.echo(visible(f"{shown} ({readable(model.n_bytes)})"))


@contextmanager
def shown_progress(console: Console) -> Iterator[hub.Progress]:
    """A bar for each thing that is done; where it goes to a file or a pipe, a line for each tenth of it."""
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:  # what was there already does not count as speed
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done)

        yield progress


class _Lines:
    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        tenths = 10 * done // max(1, total)
        if tenths > self._told.get(what, -1):
            self._told[what] = tenths
            say(f"{what}: {10 * tenths} % of {readable(total)}")


def ls(as_json: bool, settings: Settings) -> None:
    """Print the models of the folder, also what is broken."""
    folder = models_folder(settings["models"])
    found = [describe(entry, name) for entry, name in shown_names(entries(folder)).items()]
    if as_json:
        click.echo(json.dumps([asdict(model) for model in found]))  # a file's name may be no Unicode
        return
    if not found:
        say(f"no models in {folder}; `prima pull hf:OWNER/REPO` fetches one")
        return
    table = Table("name", "size", "architecture", "types", "context", "when", "fault")
    for model in found:
        table.add_row(*(escape(visible(cell)) for cell in _cells(model)))
    wide_console().print(table)


def _cells(model: Description) -> tuple[str, ...]:
    types = [f"{type} {share:.0%}" for type, share in (model.types or {}).items() if share >= 0.005]
    return (
        model.name,
        readable(model.n_bytes),
        model.architecture or "?",
        ", ".join(types),
        str(model.context_length or "?"),
        f"{datetime.fromtimestamp(model.modified_s):%Y-%m-%d %H:%M}",
        model.fault or "",
    )


def rm(text: str, yes: bool, settings: Settings) -> None:
    """Delete a model of the folder, after asking."""
    folder = models_folder(settings["models"])
    entry = find_entry(text, folder)
    size = readable(sum(path.stat().st_size for path in entry.files))
    files = "\n".join(f"  {path}" for path in entry.files)
    if not yes:
        click.confirm(visible(f"{files}\nDelete {entry.name} ({size})?"), abort=True)
    remove(entry, folder)
    say(f"deleted {entry.name} ({size})")
