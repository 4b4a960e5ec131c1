"""K or V of new tokens into pages, in the cache's type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prima_torch.kv import RUN


def write_kv(rows: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> None:
    """Put row i of `rows` f32 [n, n_kv_heads * head_dim], rows at any stride, at position slots[i] of the pool.

    pages is K or V of a layer, contiguous [n_pages, PAGE, n_kv_heads, head_dim], f32 or f16 (what f16 cannot hold
    becomes infinite), or int8 with `scales` f16 [n_pages, PAGE, n_kv_heads, head_dim / 32]: Q8_0, each run of 32
    rounded with a scale of its own, NaN for a run that is not finite. `slots` is i64 [n], page * PAGE + offset; rows
    with a negative slot are left out.
    """
    n_kv_heads, head_dim = pages.shape[2:]
    grid = len(rows), n_kv_heads
    width = triton.next_power_of_2(head_dim)
    if scales is None:
        _write[grid](rows, pages, slots, rows.stride(0), HEAD_DIM=head_dim, WIDTH=width, num_warps=1)
        return
    _write_q8_0[grid](
        rows,
        pages,
        scales,
        slots,
        rows.stride(0),
        HEAD_DIM=head_dim,
        RUNS=width // RUN,
        RUN=RUN,
        num_warps=1,
        enable_fp_fusion=False,  # a product must be rounded before it is rounded to an integer
    )


@triton.jit
def _write(rows, pages, slots, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    dims = tl.arange(0, WIDTH)
    values = tl.load(rows + row.to(tl.int64) * stride + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    at = (slot * tl.num_programs(1) + head) * HEAD_DIM + dims
    tl.store(pages + at, values.to(pages.dtype.element_ty), mask=(dims < HEAD_DIM) & (slot >= 0))


@triton.jit
def _write_q8_0(rows, pages, scales, slots, stride, HEAD_DIM: tl.constexpr, RUNS: tl.constexpr,
                RUN: tl.constexpr):  # fmt: skip
    """The arithmetic of `quantize_activation` in the numpy backend, bit for bit."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    runs = tl.arange(0, RUNS)
    dims = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
    values = tl.load(rows + row.to(tl.int64) * stride + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    is_finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1) == 1
    largest = tl.where(is_finite, tl.max(tl.abs(values), axis=1), 0.0)
    used = largest >= 1e-30
    inverse = tl.where(used, tl.div_rn(tl.full((RUNS,), 127.0, tl.float32), tl.where(used, largest, 1.0)), 0.0)
    product = tl.where(used[:, None], values, 0.0) * inverse[:, None]
    rounded = (product + 12582912.0) - 12582912.0  # 1.5 * 2^23: sums lie where floats are integers, ties go to even
    scale = tl.div_rn(tl.where(used, largest, 0.0), tl.full((RUNS,), 127.0, tl.float32))
    scale = tl.where(is_finite, scale, float("nan"))
    first = slot * tl.num_programs(1) + head
    tl.store(pages + first * HEAD_DIM + dims, rounded.to(tl.int32).to(tl.int8), mask=(dims < HEAD_DIM) & (slot >= 0))
    is_run = (runs < HEAD_DIM // RUN) & (slot >= 0)
    tl.store(scales + first * (HEAD_DIM // RUN) + runs, scale.to(tl.float16), mask=is_run)
