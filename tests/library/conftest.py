from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.library.fake_hub import FakeHub, fake_hub, isolate


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on this machine."""
    isolate(monkeypatch, tmp_path / "hf")
    with fake_hub() as served:
        yield served
