"""Norm, rope, gates and sums. Inputs are f32 with rows at any stride; each row is computed alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prima_core.arch.rope import Rope
from prima_core.model.rope import RopeKind

BLOCK = 1024
"""Elements of a row that a program takes."""


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Ops.rms_norm`: x [n, width], gain [width] or a part that `width` is a multiple of."""
    run = len(gain)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(run)
    warps = min(16, max(1, width // 512))
    _rms_norm[(len(x), x.shape[1] // run)](x, gain, out, x.stride(0), eps, RUN=run, WIDTH=width, num_warps=warps)
    return out


def rope(x: torch.Tensor, rope: Rope[torch.Tensor]) -> torch.Tensor:
    """See `Ops.rope`: x [n, heads * head_dim] is rotated in place. Cosines and sines are contiguous."""
    n_pairs = rope.cos.shape[1]
    _rope[(len(x), x.shape[1] // rope.head_dim)](
        x,
        rope.cos,
        rope.sin,
        x.stride(0),
        HEAD_DIM=rope.head_dim,
        PAIRS=n_pairs,
        WIDTH=triton.next_power_of_2(n_pairs),
        NEOX=rope.kind is RopeKind.NEOX,
        num_warps=1,
    )
    return x


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `Ops.swiglu`: in place of `gate`."""
    return _gated(gate, up, is_gelu=False)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `Ops.geglu`: in place of `gate`."""
    return _gated(gate, up, is_gelu=True)


def _gated(gate: torch.Tensor, up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    n, width = gate.shape
    grid = n, triton.cdiv(width, BLOCK)
    _gate[grid](gate, up, gate.stride(0), up.stride(0), width, IS_GELU=is_gelu, BLOCK=BLOCK, num_warps=4)
    return gate


@triton.jit
def _rms_norm(x, gain, out, stride, eps, RUN: tl.constexpr, WIDTH: tl.constexpr):
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, WIDTH)
    values = tl.load(x + row * stride + run * RUN + at, mask=at < RUN, other=0.0)
    root = tl.sqrt_rn(tl.sum(values * values, axis=0) / RUN + eps)
    normed = values / root * tl.load(gain + at, mask=at < RUN, other=0.0)
    tl.store(out + (row * tl.num_programs(1) + run) * RUN + at, normed, mask=at < RUN)


@triton.jit
def _rope(x, cosines, sines, stride, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
          NEOX: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pairs = tl.arange(0, WIDTH)
    is_pair = pairs < PAIRS
    cos = tl.load(cosines + row * PAIRS + pairs, mask=is_pair)
    sin = tl.load(sines + row * PAIRS + pairs, mask=is_pair)
    if NEOX:
        first = x + row * stride + head * HEAD_DIM + pairs
        second = first + PAIRS
    else:
        first = x + row * stride + head * HEAD_DIM + 2 * pairs
        second = first + 1
    a, b = tl.load(first, mask=is_pair), tl.load(second, mask=is_pair)
    tl.store(first, a * cos - b * sin, mask=is_pair)
    tl.store(second, a * sin + b * cos, mask=is_pair)


@triton.jit
def _gate(gate, up, gate_stride, up_stride, width, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    opened = tl.load(gate + row * gate_stride + at, mask=at < width, other=0.0)
    steep = opened
    if IS_GELU:  # 1 + tanh(z) = 2 sigmoid(2 z), and 1.59... is 2 sqrt(2 / pi)
        steep = 1.5957691216057308 * (opened + 0.044715 * opened * opened * opened)
    fall = tl.exp(-tl.abs(steep))
    sigmoid = tl.where(steep < 0, fall, 1.0) / (1 + fall)
    product = opened * sigmoid * tl.load(up + row * up_stride + at, mask=at < width, other=0.0)
    tl.store(gate + row * gate_stride + at, product, mask=at < width)
