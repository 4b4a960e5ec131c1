"""A llama in plain torch, laid out as GGUF lays it out: interleaved (NORM) rotary pairs, tied output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model. Row lengths are multiples of 256, so that K-quants can be tried on it too."""

    n_vocab: int = 2048
    n_layers: int = 8
    d_model: int = 256
    d_ff: int = 512
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 64
    n_context: int = 2048
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5


def rotations(shape: Shape, n_positions: int) -> Tensor:
    """Unit complex numbers `[n_positions, d_head / 2]`: the turn of each rotary pair at each position."""
    pair = torch.arange(0, shape.d_head, 2, dtype=torch.float32) / shape.d_head
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), shape.rope_theta**-pair)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of `x` `[batch, tokens, heads, d_head]`."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward part, each behind its norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d_query, d_kv = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
        self.attn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_epsilon)
        self.attn_q = nn.Linear(shape.d_model, d_query, bias=False)
        self.attn_k = nn.Linear(shape.d_model, d_kv, bias=False)
        self.attn_v = nn.Linear(shape.d_model, d_kv, bias=False)
        self.attn_output = nn.Linear(d_query, shape.d_model, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_epsilon)
        self.ffn_gate = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.ffn_up = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.ffn_down = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attend(self.attn_norm(x), turns)
        h = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return out

    def attend(self, h: Tensor, turns: Tensor) -> Tensor:
        heads = (*h.shape[:-1], -1, self.shape.d_head)
        q = rotate(self.attn_q(h).view(heads), turns).transpose(1, 2)
        k = rotate(self.attn_k(h).view(heads), turns).transpose(1, 2)
        v = self.attn_v(h).view(heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.attn_output(mixed.transpose(1, 2).flatten(-2))
        return out


class Llama(nn.Module):
    """Parameter names are GGUF's tensor names, `blk.0.attn_q.weight` and so on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.d_model)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.output_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_epsilon)
        self.turns: Tensor
        self.register_buffer("turns", rotations(shape, shape.n_context), persistent=False)
        self.apply(self._initialise)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states `[batch, tokens, d_model]` of `ids` `[batch, tokens]`, normed for the output matrix."""
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, self.turns[: ids.shape[1]])
        out: Tensor = self.output_norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.token_embd.weight)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
