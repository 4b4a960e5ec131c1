"""Which experts a token takes, and what their answers add up to, without a look at the scores on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prima_core.arch.ops import RoutingRule

BLOCK = 512
"""Elements of a row of answers that a program takes."""


def route(scores: torch.Tensor, rule: RoutingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts i32 and their weights f32 [n, n_used], likeliest first, for scores f32 [n, experts], contiguous.

    Ties go to the lower index, NaN is below every number: the experts are there whatever the scores.
    """
    n, n_experts = scores.shape
    experts = torch.empty((n, rule.n_used), dtype=torch.int32, device=scores.device)
    weights = torch.empty((n, rule.n_used), dtype=torch.float32, device=scores.device)
    _route[(n,)](
        scores,
        experts,
        weights,
        rule.scale,
        N_EXPERTS=n_experts,
        WIDTH=triton.next_power_of_2(n_experts),
        N_USED=rule.n_used,
        RANKS=triton.next_power_of_2(rule.n_used),
        NORMALIZE=rule.normalize,
        num_warps=1,
    )
    return experts, weights


def mix(answers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The answers f32 [n * n_used, width] of each row's experts, times their weights f32 [n, n_used], added up from
    the first: [n, width]. Both are contiguous."""
    (n, n_used), width = weights.shape, answers.shape[1]
    out = torch.empty((n, width), dtype=torch.float32, device=answers.device)
    _mix[(n, triton.cdiv(width, BLOCK))](answers, weights, out, width, N_USED=n_used, BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _route(scores, experts, weights, scale, N_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, N_USED: tl.constexpr,
           RANKS: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    indices, ranks = tl.arange(0, WIDTH), tl.arange(0, RANKS)
    own = tl.load(scores + row * N_EXPERTS + indices, mask=indices < N_EXPERTS, other=float("-inf"))
    powers = tl.exp(own - tl.max(own, axis=0))
    keys = tl.where(own == own, own, float("-inf"))
    is_free = indices < N_EXPERTS
    chosen = tl.zeros((RANKS,), tl.int32)
    shares = tl.zeros((RANKS,), tl.float32)
    for rank in range(N_USED):
        best = tl.max(tl.where(is_free, keys, float("-inf")), axis=0)
        expert = tl.min(tl.where(is_free & (keys == best), indices, WIDTH), axis=0)
        power = tl.sum(tl.where(indices == expert, powers, 0.0), axis=0)
        chosen = tl.where(ranks == rank, expert, chosen)
        shares = tl.where(ranks == rank, power, shares)
        is_free = is_free & (indices != expert)
    shares = shares / tl.sum(shares if NORMALIZE else powers, axis=0)
    tl.store(experts + row * N_USED + ranks, chosen, mask=ranks < N_USED)
    tl.store(weights + row * N_USED + ranks, shares * scale, mask=ranks < N_USED)


@triton.jit
def _mix(answers, weights, out, width, N_USED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(N_USED):
        answer = tl.load(answers + (row * N_USED + rank) * width + at, mask=at < width, other=0.0)
        total += answer * tl.load(weights + row * N_USED + rank)
    tl.store(out + row * width + at, total, mask=at < width)
