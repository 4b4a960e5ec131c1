"""Run as a program: the linear kernels are compiled for a GPU, which need not be there.

    python -m tests.prima_torch.compiling_linear COMPUTE_CAPABILITY

Prints the name of each kernel and the bytes of shared memory that it takes. A program has one row here: of the tuned
number, compilation takes minutes.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch
from triton.runtime.jit import JITFunction

from prima_core.model.quant import BLOCKS, GGUFType
from prima_torch.kernels import linear
from prima_torch.planes import split
from tests.prima_torch.compiling import compile_launch


def launch(type: GGUFType) -> None:
    bytes_of_row = 1280 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    matrix = split(type, 3, 1280, torch.zeros(3 * bytes_of_row, dtype=torch.uint8))
    linear.matvec_experts(torch.zeros(2, 1280), matrix, 1, torch.zeros(2, dtype=torch.int32))
    linear.dequantize(matrix, torch.zeros(3, 1280, dtype=torch.bfloat16))


def launch_others() -> None:
    matrix = split(GGUFType.Q4_0, 3, 1280, torch.zeros(3 * 720, dtype=torch.uint8))
    for n in (1, 2, 8):
        linear.matvec(torch.zeros(n, 1280), matrix, torch.zeros(3))


if __name__ == "__main__":
    linear.SHAPES = MappingProxyType({type: replace(shape, rows=(1, 1, 1, 1)) for type, shape in linear.SHAPES.items()})
    JITFunction.run = compile_launch
    for type in linear.SHAPES:
        launch(type)
    launch_others()
