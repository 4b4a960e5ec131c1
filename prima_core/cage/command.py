"""What runs in each node: prima itself, or the cluster file's own command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prima_core.cage.cage import Cell
from prima_core.cage.limits import Workload, filled
from prima_core.config import CLUSTER_PORT, PORT, SETTINGS, TABLE

PRIMA = (sys.executable, "-P", "-m", "prima_core")  # -P: not what lies in this folder
PRIMA_URL = f"http://127.0.0.1:{PORT}/v1"
FOR_NODES = ("backend", "kernels", "log_level")
FOR_THE_HEAD = ("kv_type", "chunk", "plan", "solver", "goal", "rounds", "wire")
Settings = Mapping[str, Any]  # values of `config.TABLE` by name, each as its click type made it


def command_of(cell: Cell, settings: Settings, work: Workload) -> list[str]:
    """The command line of a node."""
    if cell.node.command:
        return filled(cell.node, cell.place, cell.limits, cell.files[0], work)
    begin = _serve(cell, settings, work) if cell.place.rank == 0 else _join(cell, settings)
    return [*PRIMA, *begin, *_of_all_nodes(cell, settings), *cell.node.options]


def _serve(cell: Cell, settings: Settings, work: Workload) -> Iterator[str]:
    yield from ("serve", str(cell.files[0]), "--host", "127.0.0.1", "--port", str(PORT))
    if len(cell.place.addresses) > 1:
        yield from ("--listen", _listen(cell, settings), "--wait", str(len(cell.place.addresses)))
    yield from ("-c", str(settings.get("context") or work.n_prompt + work.n_gen + 1), "--parallel", "1")
    yield from _flags(FOR_THE_HEAD, settings)


def _join(cell: Cell, settings: Settings) -> Iterator[str]:
    yield from ("join", _listen(cell, settings), "--model", str(cell.files[0]))


def _listen(cell: Cell, settings: Settings) -> str:
    """Links of real computers: a transport between processes of one computer, the default, means none of those."""
    address = f"{cell.place.addresses[0]}:{CLUSTER_PORT}"
    return f"tcp://{address}" if settings.get("transport") == "tcp" else address


def _of_all_nodes(cell: Cell, settings: Settings) -> Iterator[str]:
    threads = cell.node.threads or settings.get("threads", 0)
    yield from ("--name", cell.node.name, "--memory", str(cell.limits.budget_bytes), "--threads", str(threads))
    yield from _flags(FOR_NODES, settings)


def _flags(names: Sequence[str], settings: Settings) -> Iterator[str]:
    """What the user set, as it was."""
    for name in names:
        setting = SETTINGS.get(name)
        if setting is not None and settings.get(name, setting.default) != setting.default:
            yield from (setting.flags[-1], str(settings[name]))


def environment(environ: Mapping[str, str], token: str, cache: Path) -> dict[str, str]:
    """Settings in the environment were read by the bench: nodes get what it makes of them, a token of their own, and a
    cache folder without profiles of what the machine can do outside of the cage."""
    twins = {setting.env for setting in TABLE}
    own = {"PRIMA_TOKEN": token, "XDG_CACHE_HOME": str(cache)}
    return {**{name: value for name, value in environ.items() if name not in twins}, **own}
