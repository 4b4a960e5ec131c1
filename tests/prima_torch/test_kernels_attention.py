"""Decode attention in Triton's interpreter: near the numpy backend's, and the same bits in any company."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import KvType
from prima_numpy.kv import Room
from prima_numpy.ops import _attend
from prima_torch.kernels.attention import CHUNK, JOINED, decode_attention
from prima_torch.kernels.kv_write import write_kv
from prima_torch.kv import PAGE
from tests.prima_torch.paged import Pool, empty_pool, fill, page_table, pages_of, room_of, slots_of

RULE = AttentionRule(0.3)
RULES = (
    RULE,
    AttentionRule(0.3, softcap=2),
    AttentionRule(0.3, window=1),
    AttentionRule(0.3, window=33),
    AttentionRule(0.3, window=CHUNK),
    AttentionRule(0.3, softcap=50, window=7),
    AttentionRule(0.3, window=1 << 40),
)
"""Windows beside, on and far from the edges of tiles and chunks."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of q for each sequence, whose K and V are in rooms and in pages."""

    q: torch.Tensor
    rooms: list[Room]
    k: Pool
    v: Pool
    table: torch.Tensor
    lengths: list[int]

    def attend(self, rule: AttentionRule, rows: slice = slice(None), max_length: int = 0) -> torch.Tensor:
        lengths = torch.tensor(self.lengths[rows], dtype=torch.int32)
        return decode_attention(
            self.q[rows],
            self.k.values,
            self.v.values,
            self.table[rows],
            lengths,
            rule,
            self.k.values.shape[2],
            max_length or max(1, *self.lengths),
            self.k.scales,
            self.v.scales,
        )

    def expected(self, rule: AttentionRule) -> torch.Tensor:
        out = np.zeros(self.q.shape, np.float32)
        for row, room in enumerate(self.rooms):
            if room.length:
                one = slice(row, row + 1)
                _attend(self.q.numpy()[one], room, room.length - 1, rule, out[one])
        return torch.from_numpy(out)


def batch_of(type: KvType, lengths: list[int], n_kv_heads: int, group: int, head_dim: int) -> Batch:
    rng = np.random.default_rng(len(lengths) + head_dim)
    table = page_table(lengths)
    k, v = (empty_pool(type, sum(map(pages_of, lengths)), n_kv_heads, head_dim) for _ in "kv")
    rooms = []
    for row, length in enumerate(lengths):
        rows = rng.standard_normal((2, length, n_kv_heads * head_dim), np.float32)
        rooms.append(room_of(type, n_kv_heads, *rows))
        for pool, half in ((k, rooms[-1].k), (v, rooms[-1].v)):
            fill(pool, slots_of(table, row, length), half)
    q = torch.from_numpy(rng.standard_normal((len(lengths), n_kv_heads * group * head_dim), np.float32))
    return Batch(q, rooms, k, v, table, lengths)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("type", KvType)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_see_the_positions_that_the_rule_allows(type: KvType, rule: AttentionRule) -> None:
    batch = batch_of(type, [1, CHUNK + 37, CHUNK], n_kv_heads=2, group=2, head_dim=32)
    close(batch.attend(rule), batch.expected(rule))


@pytest.mark.parametrize("type", KvType)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 160, 256])
def test_heads_of_any_size(type: KvType, head_dim: int) -> None:
    if type is KvType.Q8_0:
        head_dim = -(-head_dim // 32) * 32
    batch = batch_of(type, [70], n_kv_heads=1, group=3, head_dim=head_dim)
    close(batch.attend(RULE), batch.expected(RULE))


@pytest.mark.parametrize("group", [1, 3, 8, 16, 17, 35])
def test_groups_of_any_size(group: int) -> None:
    batch = batch_of(KvType.F32, [65], n_kv_heads=2, group=group, head_dim=16)
    close(batch.attend(RULE), batch.expected(RULE))


@pytest.mark.parametrize("window", [0, 100])
def test_more_chunks_than_are_joined_at_once(window: int) -> None:
    rule = AttentionRule(0.3, window=window)
    batch = batch_of(KvType.F32, [(JOINED + 1) * CHUNK + 1], n_kv_heads=1, group=1, head_dim=8)
    close(batch.attend(rule), batch.expected(rule))


def test_a_sequence_without_positions_gives_zeros() -> None:
    batch = batch_of(KvType.F16, [0, 3, 0], n_kv_heads=1, group=2, head_dim=8)
    out = batch.attend(RULE)
    assert not out[0].any()
    assert not out[2].any()
    close(out, batch.expected(RULE))


@pytest.mark.parametrize("rule", [RULE, AttentionRule(0.3, window=90)], ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_bucket(rule: AttentionRule) -> None:
    batch = batch_of(KvType.F16, [CHUNK + 5, 2 * CHUNK, 9], n_kv_heads=2, group=2, head_dim=16)
    together = batch.attend(rule, max_length=8 * CHUNK)
    for row, length in enumerate(batch.lengths):
        assert torch.equal(batch.attend(rule, slice(row, row + 1), max_length=length)[0], together[row])


def test_rows_of_q_may_lie_apart() -> None:
    batch = batch_of(KvType.F32, [5, 6], n_kv_heads=1, group=2, head_dim=8)
    wide = torch.full((2, 40), torch.nan)
    wide[:, 3:19] = batch.q
    apart = Batch(wide[:, 3:19], batch.rooms, batch.k, batch.v, batch.table, batch.lengths)
    assert torch.equal(apart.attend(RULE), batch.attend(RULE))


def test_large_scores_do_not_overflow() -> None:
    batch = batch_of(KvType.F32, [40], n_kv_heads=1, group=2, head_dim=8)
    rule = AttentionRule(1e4, softcap=0)
    close(batch.attend(rule), batch.expected(rule))
    capped = AttentionRule(1e4, softcap=30)
    close(batch.attend(capped), batch.expected(capped))


def test_pages_beyond_two_to_the_31_are_written_and_read() -> None:
    page = (1 << 31) // (PAGE * 256) + 1
    values = torch.from_numpy(np.zeros((page + 1, PAGE, 1, 256), np.int8))  # 2.1 GB that are hardly touched
    scales = torch.from_numpy(np.zeros((page + 1, PAGE, 1, 8), np.float16))
    row = torch.arange(256, dtype=torch.float32)[None] % 128
    row[:, ::32] = 127  # scales are 1
    write_kv(row, values, scales, torch.tensor([page * PAGE + 1]))
    table, lengths = torch.tensor([[page]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    out = decode_attention(row, values, values, table, lengths, AttentionRule(1.0), 1, 2, scales, scales)
    torch.testing.assert_close(out, row, rtol=0, atol=0)
