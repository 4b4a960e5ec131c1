"""Run as a program: the linear kernels of some types are compiled for a GPU, which need not be there.

    python -m tests.prima_torch.compiling_linear COMPUTE_CAPABILITY TYPE...  # F32 with all kernels

Prints the name of each kernel and the bytes of shared memory that it takes. A program has one row here: of the tuned
number, compilation takes minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import MappingProxyType
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from prima_core.model.quant import BLOCKS, GGUFType
from prima_torch.kernels import linear
from prima_torch.kernels.shapes import SHAPES
from prima_torch.planes import Planes, split
from tests.prima_torch.compiling import compile_launch


def launch(type: GGUFType) -> None:
    linear.matvec_experts(torch.zeros(2, 1280), planes(type), 1, torch.zeros(2, dtype=torch.int32))


def launch_all_kernels(type: GGUFType) -> None:
    for n in (1, 2, 8):
        linear.matvec(torch.zeros(n, 1280), planes(type), torch.zeros(3))
    linear.dequantize(planes(type), torch.zeros(3, 1280, dtype=torch.bfloat16))


def planes(type: GGUFType) -> Planes:
    bytes_of_row = 1280 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    return split(type, 3, 1280, torch.zeros(3 * bytes_of_row, dtype=torch.uint8))


if __name__ == "__main__":
    types = [GGUFType[name] for name in sys.argv[2:]]
    small = MappingProxyType({type: replace(SHAPES[type], rows=(1, 1, 1, 1)) for type in types})
    with patch.object(JITFunction, "run", compile_launch), patch.object(linear, "SHAPES", small):
        for type in types:
            launch(type)
        if GGUFType.F32 in types:
            launch_all_kernels(GGUFType.F32)
