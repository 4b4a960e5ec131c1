"""`prima bench --cluster`: an emulated home cluster on this machine, measured."""

from __future__ import annotations

import rich_click as click

from prima_core.cage.bench import bench_cluster
from prima_core.cage.cluster import load_cluster
from prima_core.cage.figures import shown, to_json
from prima_core.cage.limits import Workload
from prima_core.commands.setup import Settings, model_path, say
from prima_core.commands.table import wide_console
from prima_core.config import SETTINGS
from prima_core.errors import ConfigError

OF_THE_CLUSTER = ("memory", "nodes", "parallel")
"""What its file says, or what a measurement of one answer leaves no choice in."""


def bench(cluster: str, model: str | None, work: Workload, as_json: bool, settings: Settings) -> None:
    """Raises PrimaError: no such cluster, not root, a node that dies."""
    for name in OF_THE_CLUSTER:
        if settings.get(name, SETTINGS[name].default) != SETTINGS[name].default:
            raise ConfigError(f"--{name} does not go with --cluster", hint="write it in the cluster's file")
    described = load_cluster(cluster)
    with model_path(model, settings["models"]) as path:
        figures = bench_cluster(described, path, work, settings, say)
    if as_json:
        click.echo(to_json(figures).decode())
    else:
        wide_console().print(shown(figures))
