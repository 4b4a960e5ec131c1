"""A stranger's transport, installed by pip and used by name, between processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.plugins.strangers import Installed, install, listed

GREEDILY = ("-p", "one two three", "--raw", "--temp", "0", "-n", "12")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install("prima-example-transport", tmp_path_factory.mktemp("folder"))


def test_it_is_listed_among_the_plugins(installed: Installed) -> None:
    assert installed.plugin("folder") == listed("folder", "prima-example-transport", "transport folder")


def test_a_ring_over_it_says_what_one_node_says(installed: Installed, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    ask = ("run", model, *GREEDILY, "--wire", "f32", "--backend", "numpy", "--threads", "1")
    alone = installed.prima(*ask)
    assert alone.strip()
    assert installed.prima(*ask, "--nodes", "2", "--transport", "folder") == alone


def test_its_own_tests_pass(installed: Installed) -> None:
    assert "1 passed" in installed.own_tests()


def test_it_passes_the_kit_from_the_command_line(installed: Installed) -> None:
    report = installed.checks("transport", "folder", "--trusting")
    assert report.startswith("transport folder: ")
    assert report.endswith(", 2 not offered, 0 failed")  # both ask for credentials
