"""bench/cpu.py: prima as users run it, in a process of its own, and how fast the same threads read the same map.

Run as a program it is `prima` with the same arguments, and says at the end how much memory it held at most.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prima_core.arch.families import open_model
from prima_core.errors import PrimaError
from prima_core.model.names import TOKEN_EMBD
from prima_numpy.kernels import Kernels
from prima_numpy.variants import VARIANT_VARIABLE

READING_S = 1.5


@dataclass(frozen=True, slots=True)
class PrimaRun:
    """One `prima bench`; rates are of its second request, the first one warms up."""

    prefill_tok_s: float
    decode_tok_s: float
    peak_rss_bytes: int


def run_prima(path: Path, n_prompt: int, n_gen: int, threads: int, variant: str) -> PrimaRun:
    """Raises PrimaError with what prima said when it fails."""
    command = [sys.executable, "-m", "bench.cpu_prima", "bench", "--json", "--backend", "numpy", "-t", str(threads)]
    command += ["--prompt", str(n_prompt), "--gen", str(n_gen), str(path)]
    done = subprocess.run(command, env=environment(os.environ, variant), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PrimaError(f"prima bench failed: {done.stderr.strip()[-500:]}", hint=" ".join(command))
    facts, memory = map(json.loads, done.stdout.splitlines())
    return PrimaRun(facts["prefill_tok_s"], facts["decode_tok_s"], memory["peak_rss_bytes"])


def environment(own: Mapping[str, str], variant: str) -> dict[str, str]:
    """Without the user's own settings: everybody measures the same."""
    return {name: value for name, value in own.items() if not name.startswith("PRIMA_")} | {VARIANT_VARIABLE: variant}


# ---------------------------------------------------------------- reading


class Reader:
    """Reads what a decode step reads of a model, with the same threads and kernels' pattern, and does nothing else."""

    def __init__(self, path: Path, threads: int, variant: str) -> None:
        self._model = open_model(path)
        self._kernels = Kernels(threads, variant)
        file, spec = self._model.file, self._model.spec
        names = [name for name in file.tensors if name != TOKEN_EMBD or spec.tied_output]
        self._data = [file.view(name).data for name in names]
        self.n_bytes = sum(data.nbytes for data in self._data)
        self._pass()  # warms the page cache and this process's page tables

    def gb_s(self) -> float:
        """Of passes that take about READING_S together."""
        start, n_passes = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < READING_S:
            self._pass()
            n_passes += 1
        return n_passes * self.n_bytes / spent / 1e9

    def _pass(self) -> None:
        for data in self._data:
            self._kernels.read(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._data.clear()
        self._model.close()


# ---------------------------------------------------------------- the process


def main() -> None:
    atexit.register(_say_peak)
    runpy.run_module("prima_core", run_name="__main__", alter_sys=True)


def _say_peak() -> None:
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}), flush=True)


def peak_rss_bytes() -> int:
    """The most memory that was resident of this process at a time; mapped files count."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # ru_maxrss starts with what the parent process held
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
