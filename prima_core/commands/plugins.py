"""`prima plugins`: what was found, and what is wrong with it. Imports nothing that takes time."""

from __future__ import annotations

from dataclasses import asdict

import msgspec
import rich_click as click
from rich.markup import escape
from rich.table import Table

from prima_core.commands.table import wide_console
from prima_core.plugins import Registry


def plugins(as_json: bool, registry: Registry) -> None:
    """Print every plugin that was found, also broken ones."""
    rows = registry.report()
    if as_json:
        click.echo(msgspec.json.encode([asdict(row) for row in rows]).decode())
        return
    table = Table("name", "distribution", "version", "state", "offers", "facts", "fault", "hint")
    for row in rows:
        source = row.name, row.distribution, row.version, row.state.value
        table.add_row(*map(escape, (*source, ", ".join(row.offers), row.facts, row.fault, row.hint)))
    wide_console().print(table)
