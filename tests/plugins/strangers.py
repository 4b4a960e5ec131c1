"""Distributions of strangers, built and installed by pip without any network, and used in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WITHIN_S = 55.0
Build = Callable[[str], "Installed"]


def run(*arguments: str | Path, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, with the modules in `path` beside those of this environment. What is killed there leaves its
    temporary files beside `path`, where pytest clears them away."""
    environ = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path), "TMPDIR": str(path.parent)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def done(process: subprocess.CompletedProcess[str]) -> str:
    """What it printed."""
    assert process.returncode == 0, process.stderr + process.stdout
    return process.stdout


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution in a folder of its own."""

    folder: Path
    sources: Path

    def prima(self, *arguments: str | Path) -> str:
        return done(run("-m", "prima_core", *arguments, path=self.folder))

    def plugin(self, name: str) -> object:
        """What `prima plugins` says of it."""
        rows = json.loads(self.prima("plugins", "--json"))
        (row,) = [row for row in rows if row["name"] == name]
        return row

    def checks(self, *arguments: str) -> str:
        """The first line of the kit's report."""
        return done(run("-m", "prima_core.testing.checks", *arguments, path=self.folder)).partition("\n")[0]

    def own_tests(self) -> str:
        """What pytest says of the tests beside its sources."""
        return done(run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", path=self.folder, cwd=self.sources))


def install(name: str, folder: Path) -> Installed:
    """Build the wheel of an example, from a copy of its sources, and install it."""
    source = shutil.copytree(HERE / name, folder / "source")
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    done(run("-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "wheels", source))
    (wheel,) = (folder / "wheels").iterdir()
    done(run("-m", "pip", "install", *offline, "--target", folder / "site", wheel))
    return Installed(folder / "site", source)


def listed(name: str, distribution: str, offers: str, facts: str = "") -> dict[str, object]:
    """What `prima plugins --json` should say."""
    row = {"name": name, "distribution": distribution, "version": "0.1.0", "state": "ok", "offers": [offers]}
    return {**row, "facts": facts, "fault": "", "hint": ""}
