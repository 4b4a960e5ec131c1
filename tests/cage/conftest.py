"""Cages for real: needs root, `ip`, `tc` and control groups, as `prima bench --cluster` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from prima_core.cage.cage import Cage, check_host, opened
from prima_core.cage.cluster import parse_cluster
from prima_core.cage.life import FOLDER
from prima_core.cage.network import NAMESPACES
from prima_core.errors import ConfigError
from prima_core.testing.cluster import until
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="session")
def host() -> None:
    """Skips where no cage can be made; that does not depend on what is tested."""
    try:
        check_host()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file of the test's own: what others have mapped cannot be taken out of the page cache."""
    (tmp_path / "model").mkdir()
    return write_tiny_model(tmp_path / "model" / "tiny.gguf", TinyModel(n_layers=6))


@contextmanager
def cage_of(text: str, *files: Path) -> Iterator[Cage]:
    with opened(parse_cluster(f'name = "test"\n{text}'), files) as cage:
        yield cage


def traces(run: str) -> list[str]:
    """What is left of a run on this machine."""
    places = [FOLDER.glob(f"{run}*"), NAMESPACES.glob(f"{run}*"), GROUPS.glob(f"*/{run}*"), GROUPS.glob(f"{run}*")]
    return sorted(str(path) for place in places for path in place)


def run_with_node(name: str) -> str | None:
    """The run that has a node of this name, once its namespace is there."""
    found = [path.name.split(".")[0] for path in NAMESPACES.glob(f"*.node-{name}")]
    return found[0] if found else None


def until_gone(run: str, processes: Sequence[int] = ()) -> None:
    until(f"end of {run}", lambda: not traces(run) and not any(map(is_alive, processes)))


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
