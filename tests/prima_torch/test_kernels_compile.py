"""The interpreter is more lenient than the compiler: a GPU's code is made here too, although nothing can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAST_SHARED = 99 << 10
"""Bytes of shared memory that a program may take on the GPUs that have the least of it: those of compute capability 8.6
and 8.9."""


@pytest.mark.parametrize("part", ["attention", "others", "iquants"])
def test_every_kernel_compiles_for_a_gpu(part: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.prima_torch.compiling", "90", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert shared
    assert max(shared) <= LEAST_SHARED
