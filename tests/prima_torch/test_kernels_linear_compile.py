"""The interpreter is more lenient than the compiler: a GPU's code is made here too, although nothing can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prima_core.model.quant import GGUFType
from prima_torch.kernels.shapes import SHAPES

NAMES = [type.name for type in SHAPES if type != GGUFType.F32]


@pytest.mark.parametrize(
    ("capability", "names"),
    [(80, ["F32", "F16", "Q4_0"]), *((90, ["F32", *NAMES[start : start + 4]]) for start in range(0, len(NAMES), 4))],
    ids=str,
)
def test_the_linear_kernels_of_every_type_compile_for_a_gpu(capability: int, names: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.prima_torch.compiling_linear", str(capability), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert shared.keys() == {"matvec_kernel", "arrange_kernel", "sum_splits_kernel", "dequantize_kernel"}
    assert max(shared.values()) <= 48 << 10  # bytes, on every GPU
