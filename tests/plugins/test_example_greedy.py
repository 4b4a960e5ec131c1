"""A stranger's distribution, installed by pip and used by name, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prima_core.testing.tinymodel import TinyModel, write_tiny_model

EXAMPLE = Path(__file__).parent / "prima-example-greedy"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has put the example; built in a copy, without any network."""
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / EXAMPLE.name)
    target = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return target


def prima(installed: Path, *arguments: str) -> object:
    """What `prima ... --json` prints where the example is installed."""
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "prima_core", *arguments, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_listed_among_the_plugins(installed: Path) -> None:
    rows = prima(installed, "plugins")
    assert isinstance(rows, list)
    (greedy,) = [row for row in rows if row["name"] == "greedy"]
    assert greedy == {
        "name": "greedy",
        "distribution": "prima-example-greedy",
        "version": "0.1.0",
        "state": "ok",
        "offers": ["solver greedy"],
        "fault": "",
        "hint": "",
    }


def test_it_makes_the_plan_when_asked_for_by_name(installed: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    sharing = prima(installed, "plan", str(model), "--nodes", "2", "--solver", "even")
    filling = prima(installed, "plan", str(model), "--nodes", "2", "--solver", "greedy")
    assert isinstance(sharing, dict)
    assert isinstance(filling, dict)
    assert filling["solver"] == "greedy"
    assert len({visit["node"] for visit in sharing["visits"]}) == 2
    assert len({visit["node"] for visit in filling["visits"]}) == 1


def test_it_passes_the_kit_for_solvers(installed: Path) -> None:
    code = """
from prima_core.testing.solvers import check_solver
from prima_example_greedy.plugin import prima_solvers
print(check_solver(prima_solvers()[0], n_problems=40))
"""
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "solver greedy: 11 ok, 0 not offered, 0 failed" in done.stdout


def test_without_it_the_name_is_unknown(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    command = [sys.executable, "-m", "prima_core", "plan", str(model), "--solver", "greedy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode != 0
    assert "there is no solver 'greedy'" in done.stderr
