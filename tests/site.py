"""Distributions of strangers, put where Python finds them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

PREAMBLE = """\
from prima_core.hookspecs import hookimpl
from prima_core.interfaces import BackendPlugin, Device, Probe, SolverPlugin, TransportPlugin
"""


class Site:
    """A folder on `sys.path` into which a test puts distributions, as pip would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def add(self, name: str, code: str, *, distribution: str = "", points: str = "", preamble: str = PREAMBLE) -> None:
        """A distribution `stranger-NAME` with the module `NAME_plugin` behind an entry point NAME."""
        module = f"{name}_plugin"
        (self.folder / f"{module}.py").write_text(preamble + dedent(code))
        distribution = distribution or f"stranger-{name}"
        info = self.folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(points or f"[prima]\n{name} = {module}\n")
        self.modules.append(module)
