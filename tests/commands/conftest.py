"""`prima` in this process and in one of its own, and the models that it is tried on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from prima_core.cli import main
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

SIGNALS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of `prima` ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # Any: what commands print
        return json.loads(self.out)


class Prima(Protocol):
    def __call__(self, *arguments: object, stdin: bytes = b"") -> Outcome: ...


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel(n_layers=6))


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers take longer than any test."""
    return write_tiny_model(tmp_path_factory.mktemp("talkative") / "talkative.gguf", TinyModel(context_length=500_000))


@pytest.fixture
def prima(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Prima]:
    """Runs the program in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["prima", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, printed.out, printed.err)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


class Program:
    """`prima` in a process of its own, whose temporary files lie in a folder that can be looked at."""

    def __init__(self, arguments: tuple[object, ...], folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prima_core", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder), "HOME": str(folder)},
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def say(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def read_out(self, n_bytes: int) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.read(n_bytes)

    def read_err_until(self, text: str) -> str:
        """What was printed to standard error up to the line with `text`."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line.decode())
            if text in lines[-1]:
                return "".join(lines)
        raise AssertionError(f"{text!r} was not printed, but: {''.join(lines)}")

    def end(self, within_s: float = 20) -> Outcome:
        out, err = self.process.communicate(timeout=within_s)
        return Outcome(self.process.returncode, out.decode(), err.decode())


class Start(Protocol):
    def __call__(self, *arguments: object) -> Program: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the program in a process of its own, which ends with the test."""
    programs: list[Program] = []

    def start(*arguments: object) -> Program:
        programs.append(Program(arguments, tmp_path / f"process{len(programs)}"))
        return programs[-1]

    yield start
    for program in programs:
        program.__exit__()
