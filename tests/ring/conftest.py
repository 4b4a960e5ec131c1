"""Rings of workers that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ring.fakes import Ring

MakeRing = Callable[..., Ring]


@pytest.fixture
def ring_of() -> Iterator[MakeRing]:
    made: list[Ring] = []

    def make(*names: str) -> Ring:
        made.append(Ring(*names))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@pytest.fixture
def ring(ring_of: MakeRing) -> Ring:
    """The head has layers 0 and 5, b 1 to 3, c 4."""
    made = ring_of("head", "b", "c")
    made.load(("head", 0, 1), ("b", 1, 4), ("c", 4, 5), ("head", 5, 6))
    return made
