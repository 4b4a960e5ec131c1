"""Where tables are printed to."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Tables into a pipe or a file are not folded to 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
