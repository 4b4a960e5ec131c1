"""`prima profile`: how fast this machine computes and reads, measured now and kept for later starts."""

from __future__ import annotations

import threading
from contextlib import closing

import msgspec
import rich_click as click
from rich.markup import escape
from rich.table import Table

from prima_core.commands.setup import Settings, node_name, node_options, open_model_argument, say
from prima_core.commands.table import wide_console
from prima_core.interfaces import Credentials
from prima_core.memory.system import host
from prima_core.model.weights import Model
from prima_core.node.node import DATA_LIMITS, Dialer, Node
from prima_core.node.profiles import Profiles, cache_folder
from prima_core.node.profiling import Measurer
from prima_core.plan.profile import Profile
from prima_core.plugins import Registry


def profile(model: str | None, as_json: bool, settings: Settings, registry: Registry) -> None:
    """Print what nodes of this machine tell their head, for this model. Raises PrimaError."""
    with open_model_argument(model, settings) as opened:
        found = _measured(opened, settings, registry)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    wide_console().print(_table(found))
    disk = f"{found.disk_bytes_s / 1e9:,.2f} GB/s" if found.disk_bytes_s else "not known"
    click.echo(f"disk, read past the page cache: {disk}")


def _measured(model: Model, settings: Settings, registry: Registry) -> Profile:
    """By a node as every other, that joins nobody."""
    dialer = Dialer(registry, Credentials(), DATA_LIMITS)
    node = Node(node_name(), registry, node_options(settings), dialer, "inproc://", lambda report: None)
    stopping = threading.Event()
    with closing(node):
        node.start()
        say(node.explanation)
        try:
            return Measurer(Profiles(cache_folder()), host(), say, stopping.is_set).measure(node, model)
        finally:
            stopping.set()


def _table(found: Profile) -> Table:
    """Rates by the bytes of the weights that a token goes through."""
    table = Table("device", "a token at a time", "prompts, 128 tokens at a time")
    for name, rates in found.devices.items():
        prompts = f"{rates.prefill_bytes_s / 1e9:,.1f} GB/s x tokens" if rates.prefill_bytes_s else "not known"
        table.add_row(escape(name), f"{rates.decode_bytes_s / 1e9:,.2f} GB/s", prompts)
    return table
