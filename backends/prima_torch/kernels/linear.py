"""Products with quantised matrices that are read once, as they lie, and matrices as floats: Triton kernels.

A row's sums are made in one order, whatever the number of tokens: a token's result has the same bits in any company.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from prima_torch.kernels.linear_kernels import arrange_kernel, dequantize_kernel, matvec_kernel, sum_splits_kernel
from prima_torch.kernels.shapes import ARRANGED_TOKENS, LANES, SHAPES, Shape, cut, pointers, rows_of_program
from prima_torch.planes import Planes

MAX_TOKENS = 8
_VALUES = 256  # of a program of the second reduction


def matvec(x: torch.Tensor, matrix: Planes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x f32 [n, columns] @ matrix.T (+ bias f32 [rows]) -> f32 [n, rows], for n from 1 to MAX_TOKENS; all contiguous.

    Weights are float32 in registers and sums float32: the result differs from a float32 product by rounding alone.
    """
    n = x.shape[0]
    if not 1 <= n <= MAX_TOKENS:
        raise ValueError(f"matvec takes 1 to {MAX_TOKENS} tokens, not {n}")
    return _product(x, matrix, matrix.rows, bias, None)


def matvec_experts(x: torch.Tensor, stack: Planes, outputs: int, experts: torch.Tensor) -> torch.Tensor:
    """Row i of x f32 [n, columns] times expert experts[i] (i32 [n], on the device) of `stack` -> f32 [n, outputs].

    Expert e has rows e * outputs to (e + 1) * outputs. A row has the bits that `matvec` gives it for that expert alone.
    """
    return _product(x, stack, outputs, None, experts)


def dequantize(matrix: Planes, out: torch.Tensor, first_row: int = 0) -> None:
    """Write rows first_row and on of `matrix` into `out` [rows of the part, columns], contiguous: bf16, f16 or f32."""
    shape = SHAPES[matrix.type]
    rows, n_blocks = out.shape[0], _n_blocks(matrix, shape)
    n_rows = shape.rows[0]
    grid = (-(-rows // n_rows), -(-n_blocks // shape.blocks(1)))
    dequantize_kernel[grid](
        *pointers(matrix),
        out,
        first_row,
        rows,
        n_blocks,
        TYPE=matrix.type.name,
        ROWS=n_rows,
        **_lanes(shape, 1),
        num_warps=1,
    )


def _product(
    x: torch.Tensor, matrix: Planes, rows: int, bias: torch.Tensor | None, experts: torch.Tensor | None
) -> torch.Tensor:
    shape = SHAPES[matrix.type]
    columns = cut(shape, rows, matrix.columns)
    n, n_blocks = x.shape[0], _n_blocks(matrix, shape)
    tokens = 1 if experts is not None else 1 << (n - 1).bit_length()
    n_rows = rows_of_program(shape, columns, rows, tokens)
    is_arranged = tokens >= ARRANGED_TOKENS
    parts = torch.empty((columns.splits, n, rows), dtype=torch.float32, device=x.device)
    matvec_kernel[(-(-rows // n_rows), columns.splits, n if experts is not None else 1)](
        _arranged(x, shape, columns.warps, tokens) if is_arranged else x,
        *pointers(matrix),
        x if bias is None else bias,
        x if experts is None else experts,
        parts,
        n,
        rows,
        matrix.columns,
        n_blocks,
        columns.steps,
        TYPE=matrix.type.name,
        TOKENS=tokens,
        ROWS=n_rows,
        **_lanes(shape, columns.warps),
        HAS_BIAS=bias is not None and columns.splits == 1,
        HAS_EXPERTS=experts is not None,
        IS_ARRANGED=is_arranged,
        HAS_TAIL=n_blocks % shape.blocks(columns.warps) != 0,
        num_warps=columns.warps,
    )
    return parts[0] if columns.splits == 1 else _summed(parts, bias)


def _n_blocks(matrix: Planes, shape: Shape) -> int:
    if matrix.columns % shape.block:
        raise ValueError(f"rows of {matrix.columns} {matrix.type.name} weights are no multiple of {shape.block}")
    return matrix.columns // shape.block


def _arranged(x: torch.Tensor, shape: Shape, warps: int, tokens: int) -> torch.Tensor:
    """`x` in the order in which the kernel's lanes read it. Neighbouring lanes would else read far apart, which the
    first level cache serves at a fraction of its speed. Worth a launch where there are several tokens to read."""
    n, columns = x.shape
    n_blocks = columns // shape.block
    n_steps = -(-n_blocks // shape.blocks(warps))
    out = torch.empty((tokens, n_steps, shape.per_lane * LANES * warps), dtype=torch.float32, device=x.device)
    arrange_kernel[(n_steps, tokens)](x, out, n, columns, n_blocks, **_lanes(shape, warps), num_warps=warps)
    return out


def _summed(parts: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    splits, n, rows = parts.shape
    out = torch.empty((n, rows), dtype=torch.float32, device=parts.device)
    grid = (-(-n * rows // _VALUES),)
    sum_splits_kernel[grid](
        parts, parts if bias is None else bias, out, rows, n * rows, splits, HAS_BIAS=bias is not None, VALUES=_VALUES
    )
    return out


class _Lanes(TypedDict):
    BLOCKS: int
    SEGMENTS: int
    PER_LANE: int
    SPLIT: int


def _lanes(shape: Shape, warps: int) -> _Lanes:
    return _Lanes(BLOCKS=shape.blocks(warps), SEGMENTS=shape.segments, PER_LANE=shape.per_lane, SPLIT=shape.split)
