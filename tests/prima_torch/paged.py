"""K and V of several sequences in pages that lie in no order, and rooms of the numpy backend with the same content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prima_core.interfaces import Chunk, KvType
from prima_core.model.quant import kv_row_bytes
from prima_numpy.kv import Room, Stored, write
from prima_torch.kv import PAGE

ELEMENTS = {KvType.F32: np.float32, KvType.F16: np.float16, KvType.Q8_0: np.uint8}


@dataclass(frozen=True, slots=True)
class Pool:
    """One layer's K, or V."""

    values: torch.Tensor  # [n_pages, PAGE, n_kv_heads, head_dim]
    scales: torch.Tensor | None  # where the type has them


def empty_pool(type: KvType, n_pages: int, n_kv_heads: int, head_dim: int) -> Pool:
    """Full of what must not be read: NaN, or codes with NaN as their scale."""
    shape = n_pages, PAGE, n_kv_heads, head_dim
    if type is KvType.Q8_0:
        scales = torch.full((*shape[:3], head_dim // 32), torch.nan, dtype=torch.float16)
        return Pool(torch.full(shape, 127, dtype=torch.int8), scales)
    return Pool(torch.full(shape, torch.nan, dtype=torch.float16 if type is KvType.F16 else torch.float32), None)


def page_table(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """The pages of a pool of `pages_of` all of them, dealt out in no order: i32 [batch, pages]. Where a sequence has
    no page there is a number that must not be followed."""
    free = iter(np.random.default_rng(seed).permutation(sum(map(pages_of, lengths))).tolist())
    table = torch.full((len(lengths), pages_of(max(lengths))), 1 << 30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for page in range(pages_of(length)):
            table[row, page] = next(free)
    return table


def pages_of(length: int) -> int:
    return -(-length // PAGE)


def slots_of(table: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """Of positions 0 to length - 1: i64 [length]."""
    at = torch.arange(length)
    return table[row, at // PAGE].to(torch.int64) * PAGE + at % PAGE


def room_of(type: KvType, n_kv_heads: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> Room:
    """k and v [n, n_kv_heads * head_dim] as the numpy backend keeps them."""
    dtype = np.dtype(ELEMENTS[type])
    width = kv_row_bytes(type, k.shape[1] // n_kv_heads) // dtype.itemsize
    shape = n_kv_heads, len(k), width
    room = Room(np.empty(shape, dtype), np.empty(shape, dtype))
    if len(k):
        write(room, Chunk(0, 0, len(k)), k, v)
    return room


def fill(pool: Pool, slots: torch.Tensor, half: Stored) -> None:
    """Put K or V of a room at `slots`."""
    values, scales = parts_of(half)
    pool.values.flatten(0, 1)[slots] = values
    if pool.scales is not None and scales is not None:
        pool.scales.flatten(0, 1)[slots] = scales


def parts_of(half: Stored) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [n, n_kv_heads, head_dim] and scales of K or V of a room."""
    by_position = np.ascontiguousarray(half.swapaxes(0, 1))
    if half.dtype != np.uint8:
        return torch.from_numpy(by_position), None
    blocks = by_position.reshape(*by_position.shape[:2], -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return torch.from_numpy(values.reshape(*by_position.shape[:2], -1)), torch.from_numpy(scales)
