"""A stranger's backend, installed by pip and used by name, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.plugins.strangers import Installed, install, listed, run

GREEDILY = ("-p", "one two three", "--raw", "--temp", "0", "-n", "12")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install("prima-example-backend", tmp_path_factory.mktemp("float64"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", TinyModel(types="Q8_0"))


def test_it_is_listed_among_the_plugins(installed: Installed) -> None:
    assert installed.plugin("float64") == listed(
        "float64", "prima-example-backend", "backend float64", "needs nothing but numpy"
    )


def test_it_says_what_the_exact_twin_says(installed: Installed, model: Path) -> None:
    exact = installed.prima("run", model, *GREEDILY, "--backend", "numpy", "--kernels", "exact", "--kv-type", "f32")
    assert exact.strip()
    assert installed.prima("run", model, *GREEDILY, "--backend", "float64", "--kv-type", "f32") == exact


def test_a_type_that_it_lacks_is_refused_with_those_that_it_has(installed: Installed, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(d_model=256, d_ff=256, types="Q4_K"))
    refused = run("-m", "prima_core", "run", model, *GREEDILY, "--backend", "float64", path=installed.folder)
    assert refused.returncode != 0
    assert "float64 lacks Q4_K" in refused.stderr
    assert "it has F32, F16, Q8_0" in refused.stderr


def test_auto_leaves_the_cpu_to_numpy(installed: Installed, model: Path) -> None:
    devices = installed.prima("plan", model, "--json", "--backend", "auto")
    assert "numpy:cpu" in devices
    assert "float64:cpu" not in devices


def test_its_own_tests_pass(installed: Installed) -> None:
    assert "1 passed" in installed.own_tests()


def test_it_passes_the_kit_from_the_command_line(installed: Installed) -> None:
    few = ("--family", "llama", "--family", "gemma2", "--family", "mixtral")
    report = installed.checks("backend", "float64", "--type", "F32", "--type", "Q8_0", "--type", "Q4_K", *few)
    assert report.startswith("backend float64 on float64:cpu: ")
    assert report.endswith(", 4 not offered, 0 failed")  # Q4_K as a matrix and in a model, KV in Q8_0, fused operations
