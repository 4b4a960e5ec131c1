"""Fixtures of pytest for authors of plugins. In a `conftest.py`:

pytest_plugins = ["prima_core.testing.fixtures"]

def test_a_ring_says_what_one_node_says(tiny_model, ring):
    path = tiny_model("qwen2", "Q4_K")
    assert ring(path, ["numpy", "mine"]).tokens([1, 2, 3], 16) == greedy_ids(path, [1, 2, 3], 16)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from prima_core.node.node import NodeOptions
from prima_core.testing.cluster import Cluster
from prima_core.testing.cluster import ring as open_ring
from prima_core.testing.examples import example
from prima_core.testing.tinymodel import Arch, TinyModel, Types, write_tiny_model


class TinyModels(Protocol):
    def __call__(
        self, arch: Arch = "llama", types: Types = "F32", **changes: Any
    ) -> Path:  # Any: of TinyModel's fields
        """The file of `examples.example(arch, types)`; `changes` are fields of TinyModel, hence Any."""
        ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Makes random models of any family and type: `tiny_model("gemma2", "Q8_0", n_layers=4)`; each is written once."""
    folder = tmp_path_factory.mktemp("tiny-models")
    known: dict[TinyModel, Path] = {}

    def make(arch: Arch = "llama", types: Types = "F32", **changes: Any) -> Path:
        wanted = replace(example(arch, types), **changes)
        if wanted not in known:
            known[wanted] = write_tiny_model(folder / f"{len(known)}-{arch}-{types}.gguf", wanted)
        return known[wanted]

    return make


@pytest.fixture
def ring() -> Iterator[Callable[[Path, Sequence[str | NodeOptions]], Cluster]]:
    """Starts rings that end with the test: `ring(path, ["numpy", "mine"])`; see `cluster.ring`."""
    with ExitStack() as exits:

        def start(path: Path, backends: Sequence[str | NodeOptions]) -> Cluster:
            return exits.enter_context(open_ring(path, backends))

        yield start
