"""The cage: namespaces, groups, relay and files of one run; programs are started in it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from prima_core.cage import files, network
from prima_core.cage.cluster import Cluster, Node
from prima_core.cage.groups import Group, Hierarchy, hierarchies
from prima_core.cage.life import Run
from prima_core.cage.limits import Limits, Machine, Place, limits_of, wants_disk_rate
from prima_core.cage.program import Program
from prima_core.errors import ConfigError
from prima_core.model.gguf import GGUFFile

TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}
RELAY_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One node in its cage. `files` is what it reads the model from, the first part first."""

    node: Node
    limits: Limits
    place: Place
    group: Group
    namespace: Path
    files: tuple[Path, ...]


def check_host() -> tuple[Hierarchy, ...]:
    """What an emulated cluster needs of this machine; its control groups. Changes nothing; raises ConfigError."""
    if sys.platform != "linux":
        raise ConfigError("clusters are emulated on Linux only", hint="run it in a Linux machine or a virtual one")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = sorted({TOOLS[tool] for tool in missing})
        raise ConfigError(
            f"an emulated cluster needs the programs {', '.join(missing)}",
            hint=f"install {' and '.join(packages)} (Debian: apt install {' '.join(packages)})",
        )
    if os.geteuid() != 0:
        raise ConfigError(
            "an emulated cluster needs root: it makes network namespaces and control groups",
            hint=f"run it with sudo, or in a privileged container: sudo {sys.argv[0]} bench --cluster ...",
        )
    return hierarchies()


def model_files(model: Path) -> tuple[Path, ...]:
    """The parts of a model. Raises ModelError."""
    with GGUFFile.open(model) as file:
        return tuple(part.path.resolve() for part in file.parts)


def measured_machine(cluster: Cluster, model: Sequence[Path]) -> Machine:
    rate = files.direct_rate(model) if wants_disk_rate(cluster) else None
    return Machine(sum(path.stat().st_size for path in model), rate, os.cpu_count() or 1)


def limited_disk(limits: Sequence[Limits], model: Sequence[Path]) -> str | None:
    """The disk that is limited, where one is. Raises ConfigError where it cannot be."""
    return files.disk_of(model[0]) if any(one.disk_bytes_s for one in limits) else None


class Cage:
    """Use it through `opened`."""

    def __init__(
        self, run: Run, cluster: Cluster, model: Sequence[Path], machine: Machine, found: Sequence[Hierarchy]
    ) -> None:
        self.machine = machine
        self.cache_folder = run.cache_folder
        self._run = run
        self._found = found
        self._programs: list[Program] = []
        limits = [limits_of(node, machine) for node in cluster.nodes]
        device = limited_disk(limits, model)
        addresses = tuple(map(network.address, range(len(limits))))
        self.cells = tuple(
            Cell(
                node,
                limits[rank],
                Place(rank, addresses),
                Group(run.names.node(node.name), found, device),
                network.namespace(run.names.node(node.name)),
                tuple(model),
            )
            for rank, node in enumerate(cluster.nodes)
        )

    def build(self) -> None:
        """Raises ConfigError."""
        links = [(cell.node.name, cell.limits) for cell in self.cells]
        for cell in self.cells:
            cell.group.create(cell.limits)
        network.build(self._run.names, links)
        if relayed := network.relay_links(links):
            self._start_relay(relayed)
        self.cells = tuple(self._with_files(cell) for cell in self.cells)

    def _start_relay(self, links: Sequence[str]) -> None:
        group = Group(f"{self._run.names.run}.relay", self._found)
        group.create()
        command = [sys.executable, "-P", "-m", "prima_core.cage.relay", *links]
        relay = Program("relay", group, network.namespace(self._run.names.hub), command, os.environ)
        self._programs.append(relay)
        relay.wait_for("^ready$", time.monotonic() + RELAY_WITHIN_S)

    def _with_files(self, cell: Cell) -> Cell:
        if not cell.node.copy:
            return cell
        top = cell.files[0].parent / self._run.names.run
        self._run.will_copy_to(top)
        return replace(cell, files=tuple(files.copy_to(top / cell.node.name, cell.files)))

    def make_cold(self) -> None:
        """Raises ConfigError for a file that stays in the page cache."""
        files.make_cold(sorted({path for cell in self.cells for path in cell.files}))

    def start(self, cell: Cell, command: Sequence[str], env: Mapping[str, str]) -> Program:
        program = Program(cell.node.name, cell.group, cell.namespace, command, env)
        self._programs.append(program)
        return program

    def check_alive(self) -> None:
        """Raises ClusterError that names a program which has ended."""
        for program in self._programs:
            program.check_alive()

    def reap(self) -> None:
        """Once all its processes have been killed."""
        for program in self._programs:
            program.reap()


@contextmanager
def opened(cluster: Cluster, model: Sequence[Path]) -> Iterator[Cage]:
    """A cage that stands until the block ends. Raises ConfigError, before it changes anything where it can tell."""
    found = check_host()
    files.check_room(model, sum(node.copy for node in cluster.nodes))
    machine = measured_machine(cluster, model)
    limited_disk([limits_of(node, machine) for node in cluster.nodes], model)  # raises before anything is made
    run = Run.begin()
    cage = Cage(run, cluster, model, machine, found)
    try:
        cage.build()
        yield cage
    finally:
        try:
            run.end()  # kills what runs there
        finally:
            cage.reap()
