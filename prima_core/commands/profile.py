"""`prima profile`: how fast this machine computes and reads, measured now and kept for later starts."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
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
from prima_core.plan.problem import OUTPUT
from prima_core.plan.profile import DeviceRates, Profile
from prima_core.plugins import Registry
from prima_core.ring.rates import WIDTHS


class MachineNow(msgspec.Struct, frozen=True):
    """What a profile says of a machine, and what is so at this moment: its memory, of which a node would take
    `memory_bytes` for weights and KV, and that of its devices. `memory_kind`: as `memory.system.MemoryKind`, by which
    a node knows how memory is taken back from it."""

    system: str
    memory_kind: str
    total_bytes: int
    available_bytes: int
    memory_bytes: int
    devices: dict[str, int]
    profile: Profile


def profile(model: str | None, as_json: bool, settings: Settings, registry: Registry) -> None:
    """Print what nodes of this machine tell their head, for this model. Raises PrimaError."""
    with open_model_argument(model, settings) as opened:
        found = _measured(opened, settings, registry)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    wide_console().print(_table(found.profile))
    for line in _lines(found):
        click.echo(line)


def _measured(model: Model, settings: Settings, registry: Registry) -> MachineNow:
    """By a node as every other, that joins nobody."""
    options, dialer = node_options(settings), Dialer(registry, Credentials(), DATA_LIMITS)
    node = Node(node_name(), registry, options, dialer, "inproc://", lambda report: None)
    stopping = threading.Event()
    with closing(node):
        node.start()
        say(node.explanation)
        memory = host().memory()
        try:
            found = Measurer(Profiles(cache_folder()), host(), say, stopping.is_set).measure(
                node, model, options.memory
            )
        finally:
            stopping.set()
        return MachineNow(
            platform.system(),
            memory.kind.value,
            memory.total_bytes,
            memory.available_bytes,
            options.memory,
            {device.id: device.memory_bytes for device in node.devices},
            found,
        )


def _table(found: Profile) -> Table:
    """Rates by the bytes of the weights that a step goes through."""
    widths = sorted(WIDTHS)
    table = Table("device", "weights", *(f"{width} token{'s' if width > 1 else ''}" for width in widths))
    for name, rates in found.devices.items():
        for weights, cells in _rows(rates):
            table.add_row(escape(name), weights, *(cells.get(width, "-") for width in widths))
    return table


def _rows(rates: DeviceRates) -> Iterator[tuple[str, dict[int, str]]]:
    yield "as they are mixed", {1: f"{rates.decode_bytes_s / 1e9:,.2f} GB/s"}
    for name, widths in rates.rates.items():
        of = "output part" if name == OUTPUT else name
        yield of, {width: f"{rate / 1e9:,.2f} GB/s" for width, rate in widths}


def _lines(found: MachineNow) -> Iterator[str]:
    of = found.profile
    disk = f"{_rate(of.disk_bytes_s)}, in pieces of 1 MiB from anywhere {_rate(of.random_bytes_s)}"
    yield f"disk, read past the page cache: {disk}"
    yield f"memory, read by all cores: {_rate(of.memory_bytes_s)}"
    for name, rates in of.devices.items():
        if rates.copy_bytes_s:
            yield f"weights to {name}: {_rate(rates.copy_bytes_s)}"
    free, whole, mine = (size / 1e9 for size in (found.available_bytes, found.total_bytes, found.memory_bytes))
    yield (
        f"memory ({found.system}, {found.memory_kind}): {free:,.1f} of {whole:,.1f} GB free,"
        f" {mine:,.1f} GB for weights and KV of a node"
    )
    for name, memory_bytes in found.devices.items():
        yield f"memory of {name}: {memory_bytes / 1e9:,.1f} GB"


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:,.2f} GB/s" if bytes_s else "not known"
