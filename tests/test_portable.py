"""What runs on every system does not need what only some have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("prima_core", "backends", "transports", "solvers")
NOT_ON_WINDOWS = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def imported_at_once(path: Path) -> Iterator[str]:
    """Modules that a file imports whenever and wherever it is imported: not in functions, not under an `if`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_that_windows_lacks_is_imported_at_once(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    guilty = {path.name: found for path in files if (found := NOT_ON_WINDOWS & set(imported_at_once(path)))}
    assert guilty == {}
