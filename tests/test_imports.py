"""Imports point downwards, nobody imports a plugin, and loading plugins is light: read from the sources with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "prima_core"
LEVELS = (
    {"errors", "config", "_lastwords"},
    {"interfaces", "hookspecs", "events", "entrypoints"},
    {"model", "memory"},
    {"arch"},
    {"library"},
    {"plan"},
    {"border", "devices", "plugins"},
    {"engine"},
    {"ring"},
    {"node"},
    {"cage"},
    {"serve"},
    {"commands"},
    {"cli", "__main__"},
)
"""Modules and folders of prima_core; each may import from its own level and those before."""

FOR_PLUGINS = {"errors", "interfaces", "hookspecs", "model", "memory", "arch", "plan"}
"""What a backend, a transport or a solver may import of prima_core."""

FOR_TRANSPORTS = ("prima_core.ring.security.", "prima_core.ring.sockets.")
"""And a transport these: how keys are derived from the cluster's secret, and where sockets lie as files."""

PACKAGES = sorted(path for kind in ("backends", "transports", "solvers") for path in (ROOT / kind).glob("prima_*"))
EXAMPLES = sorted((ROOT / "tests" / "plugins").glob("prima-example-*/prima_example_*"))
"""What strangers do in the guide."""

REFERENCE = CORE / "testing" / "reference.py"
"""The one file of prima_core that names a plugin: the numpy backend is the reference that the kits compare with."""

HEAVY = (
    "numpy",
    "torch",
    "mlx",
    "pynng",
    "scipy",
    "tokenizers",
    "transformers",
    "jinja2",
    "psutil",
    "uvicorn",
    "huggingface_hub",
)


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path, *, at_top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports when it runs: `a.b` for `from a import b`, which may be a module or not."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            types_only = isinstance(child, ast.stmt) and is_for_types_only(child)
            if not types_only and not (at_top_only and isinstance(child, (ast.FunctionDef, ast.ClassDef))):
                waiting.append(child)


def core_parts(path: Path, *, leaving_out: str | tuple[str, ...] = ()) -> set[str]:
    """The parts of prima_core that a file imports, e.g. {"errors", "model"}; without names that start as said."""
    names = [name for name in imports(path) if name.startswith("prima_core.")]
    return {name.split(".")[1] for name in names if not name.startswith(leaving_out)}


def level_of(part: str) -> int:
    return next(level for level, parts in enumerate(LEVELS) if part in parts)


def core_files() -> list[Path]:
    return sorted(path for path in CORE.rglob("*.py") if path != CORE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def test_the_sources_are_found() -> None:
    assert len(core_files()) > 20
    assert len(PACKAGES) >= 6
    assert len(EXAMPLES) == 3


def test_every_part_of_core_has_a_level() -> None:
    assert {part_of(path) for path in core_files()} - {"testing"} <= set().union(*LEVELS)


def test_imports_point_downwards() -> None:
    upwards = [
        f"{path.relative_to(ROOT)} imports {part}"
        for path in core_files()
        if part_of(path) != "testing"
        for part in core_parts(path)
        if part == "testing" or level_of(part) > level_of(part_of(path))
    ]
    assert upwards == []


def test_core_imports_no_plugin() -> None:
    plugins = {package.name for package in PACKAGES}
    guilty = [
        path.relative_to(ROOT)
        for path in core_files()
        if path != REFERENCE and any(name.split(".")[0] in plugins for name in imports(path))
    ]
    assert guilty == []


@pytest.mark.parametrize("package", [*PACKAGES, *EXAMPLES], ids=lambda path: path.name)
def test_a_plugin_imports_the_lower_parts_of_core_and_no_other_plugin(package: Path) -> None:
    others = {other.name for other in PACKAGES} - {package.name}
    is_transport = package.parent.name in ("transports", "prima-example-transport")
    leaving_out = FOR_TRANSPORTS if is_transport else "-"
    for path in package.rglob("*.py"):
        assert core_parts(path, leaving_out=leaving_out) <= FOR_PLUGINS, path
        assert not {name.split(".")[0] for name in imports(path)} & others, path


@pytest.mark.parametrize("package", [*PACKAGES, *EXAMPLES], ids=lambda path: path.name)
def test_a_plugin_file_imports_the_standard_library_and_descriptors_only(package: Path) -> None:
    for name in imports(package / "plugin.py", at_top_only=True):
        allowed = ("prima_core.interfaces.", "prima_core.hookspecs.", "prima_core.errors.")
        assert name.split(".")[0] in sys.stdlib_module_names or name.startswith(allowed), name
    assert (package / "__init__.py").read_text() == ""


@pytest.mark.parametrize(
    "code",
    [
        "import os; from prima_core.plugins import Registry; assert len(Registry.load(os.environ).report()) >= 6",
        "import prima_core.cli",
    ],
    ids=["loading and probing plugins", "importing the command line"],
)
def test_nothing_heavy_is_imported_by(code: str) -> None:
    listing = f"{code}; import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
