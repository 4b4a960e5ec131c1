"""bench/cpu.py: llama.cpp's llama-bench beside prima, in every setting that may be its better one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from prima_core.errors import PrimaError

CLOSE = 0.9
"""A setting that reached less than this share of the best in each row of the first round is not run again."""


@dataclass(frozen=True, slots=True, order=True)
class LlamaSetting:
    """`repack`: weights copied in an order that suits its kernels, and its other extra buffers, AMX's among them."""

    repack: bool
    flash_attention: bool

    def __str__(self) -> str:
        return f"repack {'on' if self.repack else 'off'}, flash attention {'on' if self.flash_attention else 'off'}"


SETTINGS = tuple(LlamaSetting(*switches) for switches in product((False, True), repeat=2))


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """The program at `path`. Its K and V are f16, as prima's."""

    path: Path
    threads: int

    def run(
        self, model: Path, setting: LlamaSetting, prompts: Sequence[int], n_gen: int, depth: int = 0
    ) -> dict[str, float]:
        """Tokens a second by row (see `parse`). Raises PrimaError with what it said when it fails."""
        command = [str(self.path), "-m", str(model), "-t", str(self.threads), "-r", "1", "-o", "json"]
        command += ["-p", ",".join(map(str, prompts or [0])), "-n", str(n_gen), "-d", str(depth)]
        command += ["--repack", str(int(setting.repack)), "-fa", "on" if setting.flash_attention else "off"]
        return parse(self._said(command)[0])

    def build(self) -> str:
        """Which llama.cpp it is. Raises PrimaError when it is none."""
        return " ".join("".join(self._said([str(self.path), "--version"])).split())

    def _said(self, command: Sequence[str]) -> tuple[str, str]:
        """What it wrote to standard output and error."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise PrimaError(f"{self.path} cannot be run: {error}", hint="--llama-bench names that program") from error
        if done.returncode:
            raise PrimaError(f"llama-bench failed: {done.stderr.strip()[-500:]}", hint=" ".join(command))
        return done.stdout, done.stderr


def parse(report: str) -> dict[str, float]:
    """Tokens a second by the row's name, from what `-o json` prints. Raises PrimaError when that is something else."""
    try:
        return {_row(test): float(test["avg_ts"]) for test in json.loads(report)}
    except (ValueError, KeyError, TypeError) as error:
        raise PrimaError(f"llama-bench gave no JSON that is known: {report.strip()[:200]!r}") from error


def _row(test: Mapping[str, Any]) -> str:
    """As bench/cpu.py names prima's."""
    if test["n_gen"]:
        return decode_row(test["n_depth"])
    return prefill_row(test["n_prompt"])


def decode_row(depth: int) -> str:
    return f"decode at {depth}" if depth else "decode"


def prefill_row(n_prompt: int) -> str:
    return f"prefill {n_prompt}"


def worth_another_run(first: Mapping[LlamaSetting, Mapping[str, float]]) -> list[LlamaSetting]:
    """The settings that may still be the best of some row."""
    rows = {row for rates in first.values() for row in rates}
    best = {row: max(rates[row] for rates in first.values()) for row in rows}
    return [setting for setting, rates in first.items() if any(rates[row] >= CLOSE * best[row] for row in rows)]
