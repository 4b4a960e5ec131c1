"""What every test gets: no settings of the developer's own (but where test data lies)."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PRIMA_") and name != "PRIMA_TEST_DATA":
            monkeypatch.delenv(name)
