"""The interpreter is more lenient than the compiler: a GPU's code is made here too, although nothing can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prima_core.model.quant import GGUFType
from prima_torch.kernels.shapes import SHAPES
from prima_torch.kernels.tables import table

LEAST_SHARED = 99 << 10
"""Bytes of shared memory that a program may take on the GPUs that have the least of it: those of compute capability 8.6
and 8.9."""
CPU = torch.device("cpu")
TYPES = [type for type in SHAPES if table(type, CPU) is None or type == GGUFType.IQ2_S]
"""Of the types with codebooks one: a product takes 5 s to compile, and the part `iquants` has what differs."""

NAMES = [type.name for type in TYPES if type != GGUFType.F32]

Compiled = Callable[..., dict[str, int]]


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    """Runs a program of this folder; gives the most bytes of shared memory that each kernel takes."""

    def run(program: str, *arguments: str) -> dict[str, int]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", f"tests.prima_torch.{program}", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        taken: dict[str, int] = {}
        for name, n_bytes in (line.split() for line in done.stdout.splitlines()):
            taken[name] = max(int(n_bytes), taken.get(name, 0))
        return taken

    return run


@pytest.mark.parametrize("part", ["attention", "large attention", "others", "iquants"])
def test_every_kernel_compiles_for_a_gpu(part: str, compiled: Compiled) -> None:
    assert max(compiled("compiling", "90", part).values()) <= LEAST_SHARED


def test_every_linear_kernel_compiles_for_a_gpu(compiled: Compiled) -> None:
    shared = compiled("compiling_linear", "90", "F32")
    assert shared.keys() == {"matvec_kernel", "arrange_kernel", "sum_splits_kernel", "dequantize_kernel"}
    assert max(shared.values()) <= 48 << 10  # bytes, on every GPU


@pytest.mark.parametrize(
    ("capability", "names"),
    [("80", ["F16", "Q4_0"]), *(("90", NAMES[start : start + 5]) for start in range(0, len(NAMES), 5))],
    ids=str,
)
def test_products_compile_for_a_gpu(capability: str, names: list[str], compiled: Compiled) -> None:
    assert compiled("compiling_linear", capability, *names)["matvec_kernel"] <= 48 << 10
