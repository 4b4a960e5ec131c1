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
