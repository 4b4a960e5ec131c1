"""bench/gpu.py is sent to machines that have torch, Triton and numpy, and this repository as a folder."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu

pytest.importorskip("triton", reason="Triton is there on Linux only")

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"
ABSENT = ("click", "gguf", "jinja2", "msgspec", "pluggy", "prometheus_client", "psutil", "pynng", "rich", "starlette",
          "tokenizers", "uvicorn")  # fmt: skip
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is not there", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def sections(folder: Path, *parts: str) -> dict[str, list[dict[str, object]]]:
    """The rows of each part that the script reports."""
    numbers = folder / "numbers.json"
    done = run(str(SCRIPT), "--tiny", "--profile", "--only", *parts, "--json", str(numbers), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all results right" in done.stdout
    found = json.loads(numbers.read_text())["sections"]
    assert all(section["right"] and section["rows"] for section in found)
    return {section["part"]: section["rows"] for section in found}


@pytest.mark.parametrize("parts", [("linear", "attention"), ("ops", "graphs")], ids=" and ".join)
def test_results_are_checked_where_only_torch_triton_and_numpy_are(parts: tuple[str, ...], tmp_path: Path) -> None:
    assert tuple(sections(tmp_path, *parts)) == parts


def test_speed_is_measured_where_only_torch_triton_and_numpy_are(tmp_path: Path) -> None:
    parts = ("machine", "kernels", "model")
    found = sections(tmp_path, *parts)
    assert set(found) == {*parts, "compile"}  # which goes before
    decode = next(row for row in found["model"] if row["what"] == "decode, batch 1")
    assert isinstance(decode["tokens/s"], float)
    assert decode["tokens/s"] > 0
    assert isinstance(decode["share"], float)
    assert decode["share"] > 0


def test_without_a_choice_every_part_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.parse().only == ("linear", "attention", "ops", "graphs", "machine", "kernels", "model")


def test_the_backend_can_be_loaded_there(tmp_path: Path) -> None:
    folders = f"import sys; sys.path[:0] = {[str(SCRIPT.parent.parent), str(SCRIPT.parent.parent / 'backends')]}"
    done = run("-c", f"{folders}; import prima_torch.backend, bench.gpu_speed", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_or_does_not_run_fails_the_script_and_stops_no_other_part(tmp_path: Path) -> None:
    """The interpreter's variable is set by the script; a Triton that cannot be imported breaks all parts but one."""
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton')")
    done = run(str(SCRIPT), "--tiny", "--only", "ops", "machine", folder=tmp_path)
    assert done.returncode == 1
    assert "ops: FAILED" in done.stdout
    assert "no Triton" in done.stdout
    assert "machine: right" in done.stdout


def test_a_part_that_is_stopped_keeps_the_rows_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(command: list[str], **_: object) -> None:
        Path(command[command.index("--result") + 1]).write_text('["kernels", "row", {"type": "Q4_0"}]\n')
        raise subprocess.TimeoutExpired(command, 90)

    monkeypatch.setattr(subprocess, "run", stopped)
    options = argparse.Namespace(tiny=False, profile=False)
    [section] = gpu.run(gpu.Job(("kernels",), 370), options, time.monotonic(), {})
    assert section["rows"] == [{"type": "Q4_0"}]
    assert (section["right"], section["error"]) == (False, "not done 370 s after the start of all")


def test_what_is_measured_is_compiled_before_and_all_ends_within_eight_minutes() -> None:
    checks, *measured = gpu.stages(argparse.Namespace(tiny=False, only=["kernels", "model", "machine"]))
    assert {job.parts[0].split(":")[0] for job in checks} == {"compile"}
    assert [job.parts for [job] in measured] == [("machine",), ("kernels",), ("model",)]
    assert all(job.by_s < 480 for [job] in measured)
