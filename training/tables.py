"""Reads the files of `training/text`, the only files that the training text is made from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_FOLDER = Path(__file__).with_name("text")


def read_table(name: str) -> dict[str, Any]:  # Any: what TOML holds; each maker checks what it takes
    """The file `name` of the text folder. Raises OSError or tomllib.TOMLDecodeError."""
    return tomllib.loads((TEXT_FOLDER / name).read_text(encoding="utf-8"))


def read_words() -> list[str]:
    """Words for spelling, in the order of the file."""
    return (TEXT_FOLDER / "words.txt").read_text(encoding="utf-8").split()


def phrases(table: Mapping[str, Any], name: str) -> Sequence[str]:
    """The list of patterns `name`. Raises ValueError when it is absent, empty or no list of texts."""
    found = table.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise ValueError(f"{name!r} must be a list of texts, not {found!r}")
    return found
