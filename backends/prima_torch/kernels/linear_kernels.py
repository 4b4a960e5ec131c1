"""Kernels over quantised matrices: products with 1 to 8 vectors, and a matrix as floats. `linear.py` calls them."""

import triton
import triton.language as tl

from prima_torch.kernels import tiles
from prima_torch.kernels.bits import split4


@triton.jit
def arrange_kernel(
    x,  # f32 [n, columns]
    out,  # f32 [tokens, steps, PER_LANE / 4, BLOCKS * SEGMENTS, 4], zeros for tokens and blocks that are not there
    n,
    columns,
    n_blocks,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_LANE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (i, j): step i of token j, in the order in which the lanes of `matvec_kernel` read it."""
    RUN: tl.constexpr = 16 if PER_LANE > 16 else PER_LANE
    step, token = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCKS * SEGMENTS)
    block, segment = step * BLOCKS + lane // SEGMENTS, lane % SEGMENTS
    column = block * (SEGMENTS * PER_LANE) + segment // SPLIT * (PER_LANE * SPLIT) + segment % SPLIT * RUN
    source = x + token.to(tl.int64) * columns + column
    target = out + (token.to(tl.int64) * tl.num_programs(0) + step) * (BLOCKS * SEGMENTS * PER_LANE) + lane * 4
    is_there = (block < n_blocks) & (token < n)
    four = tl.arange(0, 4)
    for p in tl.static_range(0, PER_LANE, 4):
        start = p // RUN * (RUN * SPLIT) + p % RUN
        value = tl.load(source[:, None] + start + four, mask=is_there[:, None], other=0.0)
        tl.store(target[:, None] + p * (BLOCKS * SEGMENTS) + four, value)


@triton.jit
def matvec_kernel(
    x,  # f32 [n, columns] where n is TOKENS (or HAS_EXPERTS), or what `arrange_kernel` makes of it where IS_ARRANGED
    f0,
    f1,
    f2,
    f3,
    f4,
    table,
    bias,  # f32 [rows], where HAS_BIAS
    experts,  # i32 [n], where HAS_EXPERTS: token i takes rows experts[i] * rows and on
    out,  # f32 [splits, n, rows]
    n,
    rows,
    columns,
    n_blocks,
    steps,
    TYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_LANE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    IS_ARRANGED: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # whether the last step has fewer blocks than others
):
    """Program (i, j, k): rows i * ROWS and on, steps j * `steps` and on of BLOCKS blocks, tokens k * TOKENS and on.

    BLOCKS * SEGMENTS lanes, 32 to a warp. The inputs of four columns are loaded, then used for all rows: registers hold
    them, the words of the rows and one sum for each row, token and lane.
    """
    RUN: tl.constexpr = 16 if PER_LANE > 16 else PER_LANE
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    segment = tl.arange(0, SEGMENTS)[None, None, :]
    column = segment // SPLIT * (PER_LANE * SPLIT) + segment % SPLIT * RUN
    has_row, has_token = row < rows, token < n
    first = tl.minimum(row, rows - 1)  # what is read for rows that are not there is not written
    if HAS_EXPERTS:
        first += tl.load(experts + tl.program_id(2)).to(tl.int64) * rows
    n_steps = tl.cdiv(n_blocks, BLOCKS)
    sums = tl.zeros((ROWS, TOKENS, BLOCKS, SEGMENTS), tl.float32)
    for step in range(tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, n_steps)):
        block = (step * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
        has_block = block < n_blocks if HAS_TAIL else tl.full((1, BLOCKS, 1), True, tl.int1)
        # Said to have no neighbours, so that every load is laid out lane by lane, as the words are.
        at = tl.max_contiguous(first[:, None, None] * n_blocks + block, (1, 1, 1))
        raw = tiles.load(TYPE, f0, f1, f2, f3, f4, table, at, segment, has_block)
        if IS_ARRANGED:
            lane = tl.arange(0, BLOCKS)[None, :, None] * SEGMENTS + segment
            inputs = x + (token[:, None, None] * n_steps + step) * (BLOCKS * SEGMENTS * PER_LANE) + lane * 4
        else:
            inputs = x + token[:, None, None] * columns + block * (SEGMENTS * PER_LANE) + column
        for p in tl.static_range(0, PER_LANE, 4):
            if IS_ARRANGED:
                four = split4(tl.load(inputs[:, :, :, None] + p * (BLOCKS * SEGMENTS) + tl.arange(0, 4)))
            else:
                start = p // RUN * (RUN * SPLIT) + p % RUN
                pointer = inputs[:, :, :, None] + start + tl.arange(0, 4)
                four = split4(tl.load(pointer, mask=has_block[:, :, :, None], other=0.0))
            for i in tl.static_range(4):
                sums = tl.fma(tiles.weight(TYPE, raw, p + i)[:, None], four[i][None], sums)
    total = tl.sum(tl.sum(sums, axis=3), axis=2) * tiles.unit(TYPE)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=has_row, other=0.0)[:, None]
    target = out + (tl.program_id(1).to(tl.int64) * n + token[None, :]) * rows + row[:, None]
    tl.store(target, total, mask=has_row[:, None] & has_token[None, :])


@triton.jit
def sum_splits_kernel(parts, bias, out, rows, n_values, splits, HAS_BIAS: tl.constexpr, VALUES: tl.constexpr):
    """parts [splits, n, rows] -> out [n, rows], in the order of the splits, plus bias [rows]."""
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    is_value = value < n_values
    total = tl.zeros((VALUES,), tl.float32)
    for _ in range(splits):
        total += tl.load(parts + value, mask=is_value, other=0.0)
        parts += n_values
    if HAS_BIAS:
        total += tl.load(bias + value % rows, mask=is_value, other=0.0)
    tl.store(out + value, total, mask=is_value)


@triton.jit
def dequantize_kernel(
    f0,
    f1,
    f2,
    f3,
    f4,
    table,
    out,  # [rows, columns] of any float type
    first_row,
    rows,
    n_blocks,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_LANE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (i, j): rows i * ROWS and on, blocks j * BLOCKS and on. One warp."""
    RUN: tl.constexpr = 16 if PER_LANE > 16 else PER_LANE
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    segment = tl.arange(0, SEGMENTS)[None, None, :]
    mask = (row < rows) & (block < n_blocks)
    at = tl.max_contiguous((row + first_row) * n_blocks + block, (1, 1, 1))
    raw = tiles.load(TYPE, f0, f1, f2, f3, f4, table, at, segment, mask)
    column = segment // SPLIT * (PER_LANE * SPLIT) + segment % SPLIT * RUN
    target = out + (row * n_blocks + block) * (SEGMENTS * PER_LANE) + column
    for p in tl.static_range(0, PER_LANE, RUN):
        weights = (_run(TYPE, raw, p, 1, RUN) * tiles.unit(TYPE)).to(out.dtype.element_ty)
        tl.store(target[:, :, :, None] + p * SPLIT + tl.arange(0, RUN), weights, mask=mask[:, :, :, None])


@triton.jit
def _run(TYPE: tl.constexpr, raw, P: tl.constexpr, STEP: tl.constexpr, LENGTH: tl.constexpr):
    """Weights P, P + STEP, ... of each segment: [rows, blocks, segments, LENGTH]."""
    if LENGTH == 1:
        return tiles.weight(TYPE, raw, P)[:, :, :, None]
    else:
        even = _run(TYPE, raw, P, 2 * STEP, LENGTH // 2)
        odd = _run(TYPE, raw, P + STEP, 2 * STEP, LENGTH // 2)
        return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], even.shape[2], LENGTH))
