"""Attention of single rows (decode) over K and V in pages, which lie anywhere in a pool.

Positions are taken in chunks of a fixed size, each by a program of its own with an online softmax (Milakov and
Gimelshein 2018) in f32; a second kernel joins the chunks in their order (Flash-Decoding, Dao et al. 2023). Where a
chunk begins never depends on the batch, so a row has the same bits in any company. Lengths and page numbers are read on
the device; the grid follows from shapes and `max_length` alone, so a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prima_core.arch.ops import AttentionRule
from prima_torch.kv import PAGE, RUN

CHUNK = 128
"""Positions that one program sees."""
TILE = 32
"""Positions that a program loads at once, a part of a page; half of them for heads of more than 128 values, whose tiles
would take more shared memory than some GPUs have (99 KiB on Ada)."""
MOST_HEADS = 16
"""Query heads of a group that share a program; larger groups take several."""
JOINED = 16
"""Chunks that the second kernel loads at once."""


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    rule: AttentionRule,
    n_kv_heads: int,
    max_length: int,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q . K * scale) . V for each row over the positions of its sequence: [batch, n_heads * head_dim] f32.

    q is f32 [batch, n_heads * head_dim], rows at any stride. k and v are a layer's pages [n_pages, PAGE, n_kv_heads,
    head_dim], contiguous, f32 or f16, or int8 with scales f16 [n_pages, PAGE, n_kv_heads, head_dim / 32] (Q8_0).
    Row i sees the first lengths[i] <= max_length positions, its own the last of them, as far back as `rule` lets it;
    position p lies in page table[i, p // PAGE]. `lengths` is i32 [batch], `table` i32 [batch, pages]. A row of length
    0 gives zeros.
    """
    batch, head_dim = len(q), k.shape[3]
    n_heads = q.shape[1] // head_dim
    group = n_heads // n_kv_heads
    heads = min(MOST_HEADS, triton.next_power_of_2(group))
    parts = triton.cdiv(group, heads)
    n_chunks = triton.cdiv(max_length, CHUNK)
    window = min(rule.window, max_length)  # a file may hold any number
    width = max(16, triton.next_power_of_2(head_dim))  # what tl.dot takes at least
    sums = torch.empty((batch, n_heads, n_chunks, head_dim), dtype=torch.float32, device=q.device)
    best, weights = torch.empty((2, batch, n_heads, n_chunks), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, n_heads * head_dim), dtype=torch.float32, device=q.device)
    _attend[(batch, n_kv_heads * parts, n_chunks)](
        q,
        k,
        v,
        k if k_scales is None else k_scales,
        v if v_scales is None else v_scales,
        table,
        lengths,
        sums,
        best,
        weights,
        q.stride(0),
        table.stride(0),
        rule.scale,
        rule.softcap,
        window,
        n_chunks,
        N_KV_HEADS=n_kv_heads,
        GROUP=group,
        HEADS=heads,
        PARTS=parts,
        HEAD_DIM=head_dim,
        WIDTH=width,
        SCALED=k_scales is not None,
        CAPPED=rule.softcap > 0,
        PAGE=PAGE,
        CHUNK=CHUNK,
        TILE=TILE if width <= 128 else TILE // 2,
        RUN=RUN,
        num_warps=4,
        num_stages=2,
    )
    _join[(batch, n_heads)](
        sums,
        best,
        weights,
        lengths,
        out,
        window,
        n_chunks,
        HEAD_DIM=head_dim,
        WIDTH=width,
        CHUNK=CHUNK,
        JOINED=JOINED,
        num_warps=4,
    )
    return out


@triton.jit
def _tile(pages, scales, first, offsets, dims, seen, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
          SCALED: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """[positions, WIDTH] f32, 0 beyond HEAD_DIM and where nothing is to be seen. `first` counts rows of HEAD_DIM."""
    is_there = seen[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(pages + first * HEAD_DIM + offsets[:, None] * HEAD_DIM + dims[None, :], mask=is_there, other=0)
    values = values.to(tl.float32)
    if SCALED:
        runs = tl.arange(0, WIDTH // RUN)
        is_run = seen[:, None] & (runs < HEAD_DIM // RUN)[None, :]
        at = first * (HEAD_DIM // RUN) + offsets[:, None] * (HEAD_DIM // RUN) + runs[None, :]
        units = tl.load(scales + at, mask=is_run, other=0).to(tl.float32)
        by_run = tl.reshape(values, (values.shape[0], WIDTH // RUN, RUN)) * units[:, :, None]
        values = tl.reshape(by_run, (values.shape[0], WIDTH))
    return values


@triton.jit(do_not_specialize=["table_stride", "window", "n_chunks"])
def _attend(q, k, v, k_scales, v_scales, table, lengths, sums, maxima, weights, q_stride, table_stride, scale,
            softcap, window, n_chunks, N_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
            PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
            CAPPED: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
            RUN: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // PARTS
    chunk = tl.program_id(2)
    length = tl.load(lengths + row)
    sight = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    start = tl.maximum(chunk * CHUNK, sight // TILE * TILE)  # every tile holds a position to see
    stop = tl.minimum(chunk * CHUNK + CHUNK, length)

    dims = tl.arange(0, WIDTH)
    rank = tl.program_id(1) % PARTS * HEADS + tl.arange(0, HEADS)
    heads = kv_head * GROUP + rank
    is_part = (rank < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    at = row.to(tl.int64) * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    own = tl.load(q + at, mask=is_part, other=0.0) * scale

    best = tl.full((HEADS,), float("-inf"), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, WIDTH), tl.float32)
    for begin in range(start, stop, TILE):
        page = tl.load(table + row.to(tl.int64) * table_stride + begin // PAGE).to(tl.int64)
        positions = begin + tl.arange(0, TILE)
        seen = (positions >= sight) & (positions < stop)
        first = (page * PAGE + begin % PAGE) * N_KV_HEADS + kv_head
        offsets = tl.arange(0, TILE) * N_KV_HEADS
        keys = _tile(k, k_scales, first, offsets, dims, seen, HEAD_DIM, WIDTH, SCALED, RUN)
        values = _tile(v, v_scales, first, offsets, dims, seen, HEAD_DIM, WIDTH, SCALED, RUN)  # asked for early
        if GROUP == 1:
            scores = tl.sum(own * keys, axis=1)[None, :]
        else:
            scores = tl.dot(own, tl.trans(keys), input_precision="tf32x3")
        if CAPPED:
            fall = tl.exp(tl.abs(scores) * (-2 / softcap))
            scores = tl.where(scores < 0, -softcap, softcap) * (1 - fall) / (1 + fall)  # tanh, of no large power
        scores = tl.where(seen[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, axis=1))
        fading = tl.exp(best - better)
        shares = tl.exp(scores - better[:, None])
        if GROUP == 1:
            mixed = tl.sum(tl.trans(shares) * values, axis=0)[None, :]
        else:
            mixed = tl.dot(shares, values, input_precision="tf32x3")
        weight = weight * fading + tl.sum(shares, axis=1)
        total = total * fading[:, None] + mixed
        best = better

    if start < stop:
        of_chunk = (row.to(tl.int64) * (N_KV_HEADS * GROUP) + heads) * n_chunks + chunk
        tl.store(sums + of_chunk[:, None] * HEAD_DIM + dims[None, :], total, mask=is_part)
        tl.store(maxima + of_chunk, best, mask=rank < GROUP)
        tl.store(weights + of_chunk, weight, mask=rank < GROUP)


@triton.jit(do_not_specialize=["window", "n_chunks"])
def _join(sums, maxima, weights, lengths, out, window, n_chunks, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
          CHUNK: tl.constexpr, JOINED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    head = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths + row)
    sight = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    stop = tl.cdiv(length, CHUNK)
    dims = tl.arange(0, WIDTH)
    is_value = dims < HEAD_DIM

    best = tl.full((), float("-inf"), tl.float32)
    weight = tl.zeros((), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for begin in range(sight // CHUNK, stop, JOINED):
        chunks = begin + tl.arange(0, JOINED)
        at = head * n_chunks + chunks
        maximum = tl.load(maxima + at, mask=chunks < stop, other=float("-inf"))
        better = tl.maximum(best, tl.max(maximum, axis=0))
        fading = tl.exp(best - better)
        shares = tl.exp(maximum - better)
        own = tl.load(sums + at[:, None] * HEAD_DIM + dims[None, :],
                      mask=(chunks < stop)[:, None] & is_value[None, :], other=0.0)  # fmt: skip
        weight = weight * fading + tl.sum(tl.load(weights + at, mask=chunks < stop, other=0.0) * shares, axis=0)
        total = total * fading + tl.sum(own * shares[:, None], axis=0)
        best = better
    mixed = total / tl.where(length > 0, weight, 1.0)
    tl.store(out + head * HEAD_DIM + dims, mixed, mask=is_value)
