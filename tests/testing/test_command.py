"""The kits from the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from prima_core.testing.command import checks

FEW = ["--type", "Q4_K", "--family", "phi3"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(checks, arguments)


def test_a_sound_backend_is_told_in_a_table() -> None:
    result = run("backend", "numpy", "--device", "numpy:cpu", "--threads", "1", "--blocks", "0.1", *FEW)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("backend numpy on numpy:cpu: ")
    assert "\n  type Q4_K " in result.stdout
    assert "\n  family phi3 " in result.stdout
    assert "type Q8_0" not in result.stdout
    assert result.stderr == ""


def test_faults_are_told_with_exit_code_1() -> None:
    result = run("backend", "numpy", "--kernels", "native", "--json", *FEW)
    assert result.exit_code == 1
    failed = {check["name"] for check in json.loads(result.stdout)["checks"] if check["state"] == "failed"}
    assert {"ops matrix Q4_K", "type Q4_K"} <= failed
    assert "family phi3" not in failed
    assert "hint:     a backend that rounds" in result.stderr


def test_a_transport_is_checked_by_its_scheme() -> None:
    result = run("transport", "inproc", "--trusting", "--one-process")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("transport inproc: ")


def test_a_solver_is_checked_by_its_name() -> None:
    result = run("solver", "even", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["subject"] == "solver even"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["backend", "nump"], "did you mean 'numpy'?"),
        (["backend", "numpy", "--device", "numpy:gpu"], "no device 'numpy:gpu' (there are: numpy:cpu)"),
        (["transport", "pigeon"], "pigeon"),
        (["solver", "event"], "did you mean 'even'?"),
    ],
)
def test_what_cannot_be_checked_is_an_error_with_exit_code_2(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
