"""What a user's pip makes of this repository: the source package, and the wheel where there is no compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())  # Any: TOML


def build(kind: str, source: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Call the build backend as pip does, without isolation, so that nothing is downloaded."""
    code = f"from scikit_build_core.build import build_{kind}; build_{kind}({str(target)!r})"
    environment = {**os.environ, **environ}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


@pytest.fixture(scope="module")
def source_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source package."""
    folder = tmp_path_factory.mktemp("sdist")
    done = build("sdist", ROOT, folder)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def without_compiler() -> dict[str, str]:
    return {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "CMAKE_GENERATOR": "Ninja"}


def test_without_a_compiler_the_source_package_gives_a_whole_pure_wheel(source_package: Path, tmp_path: Path) -> None:
    done = build("wheel", source_package, tmp_path, **without_compiler(), PRIMA_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files() <= names
    assert not [name for name in names if re.search(r"\.(cpp|h|inl|so|pyd)$|CMakeLists\.txt$|__pycache__", name)]
    assert {name.split("/")[0] for name in names} == {
        *packages(),
        f"prima_llm-{PROJECT['project']['version']}.dist-info",
    }


def test_without_a_compiler_a_required_native_module_is_an_error(source_package: Path, tmp_path: Path) -> None:
    done = build("wheel", source_package, tmp_path, **without_compiler(), PRIMA_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def packages() -> dict[str, Path]:
    """The import packages of the tree with their folders."""
    kinds = [ROOT / kind for kind in ("backends", "transports", "solvers")]
    return {
        path.name: path for path in (ROOT / "prima_core", *(path for kind in kinds for path in kind.glob("prima_*")))
    }


def expected_files() -> set[str]:
    """Every Python file, stub and datum of the packages, as they are called in a wheel."""
    kinds = ("*.py", "*.pyi", "*.gguf", "*.md", "*.toml", "py.typed")
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages().items()
        for kind in kinds
        for path in folder.rglob(kind)
    }


def test_all_packages_of_the_tree_are_in_the_wheel_list() -> None:
    listed = {ROOT / folder for folder in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]}
    assert listed == set(packages().values())


def test_every_plugin_of_the_tree_has_an_entry_point() -> None:
    plugins = {name for name, folder in packages().items() if (folder / "plugin.py").exists()}
    points = PROJECT["project"]["entry-points"]["prima"]
    assert points == {name.removeprefix("prima_"): f"{name}.plugin" for name in plugins}


def test_the_test_environment_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    pinned = {normalised(line.partition("==")[0]) for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["testing"], *extras["torch"]]
    names = {normalised(re.split(r"[<>=;\[ ]", requirement)[0]) for requirement in wanted}
    assert names - {"prima-llm"} <= pinned


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_installed_distribution_is_this_one() -> None:
    installed = {normalised(re.split(r"[<>=; \[]", line)[0]) for line in requires("prima-llm") or []}
    named = {normalised(re.split(r"[<>=;\[ ]", line)[0]) for line in PROJECT["project"]["dependencies"]}
    assert named <= installed
