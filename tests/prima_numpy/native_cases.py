"""Calls of every kernel with what the numpy twin gives for them: what a variant must do wherever it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import Chunk, KvType, Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.randomblocks import write_units
from prima_numpy.kv import Pass, Room, Stored, write
from prima_numpy.quant import dequantize_rows, linear_int8
from prima_numpy.twin import Int8Ops
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_stack, random_weight
from tests.prima_numpy.native_driver import Case, bits_of

Float32s = NDArray[np.float32]
TWIN = Int8Ops()
ROWS = (1, 2, 3, 8, 33, 256)
"""Activation rows."""
KV_CODE = {KvType.F32: 0, KvType.F16: 1, KvType.Q8_0: 2}
RULES = (
    AttentionRule(0.2),
    AttentionRule(0.2, softcap=3),
    AttentionRule(0.2, window=33),
    AttentionRule(0.2, softcap=50, window=7),
)


def ragged_cols(type: GGUFType) -> int:
    """A number of columns that is a multiple of the block, and of nothing larger."""
    return {1: 3 * 16 + 7, 32: 3 * 32, 256: 3 * 256}[BLOCKS[type].n_weights]


def product_cases(types: Sequence[GGUFType] = tuple(GGUFType), n_rows: Sequence[int] = ROWS) -> Iterator[Case]:
    """All types: any codes, ragged sizes, few and many activation rows."""
    for type in types:
        for rows, n in product((6, 37), n_rows):
            yield linear_case(random_weight(type, rows, ragged_cols(type)), random_rows(n, ragged_cols(type)))


def hostile_cases(n_rows: Sequence[int] = (1, 2, 9)) -> Iterator[Case]:
    """Blocks of any bytes, codes and activations at their ends, activations that are no numbers."""
    rng = np.random.default_rng(3)
    for type, n in product(QUANTISED, n_rows):
        size = 20 * 512 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
        yield linear_case(Weight("any", type, (20, 512), rng.integers(0, 256, size, np.uint8)), random_rows(n, 512))
        for byte, value in product((0x00, 0x7F, 0x80, 0xFF), (1, -1)):
            yield linear_case(extreme_weight(type, byte), np.full((n, 512), value, np.float32))
        for bad in (np.nan, np.inf, 3e38, 1e-38):
            x = random_rows(n, 512)
            x[0, 256:] = bad
            yield linear_case(random_weight(type, 6, 512), x)


def extreme_weight(type: GGUFType, byte: int) -> Weight:
    """[18, 512] with all codes and packed scales of one byte."""
    data = np.full(18 * 512 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes, byte, np.uint8)
    blocks = data.reshape(-1, BLOCKS[type].n_bytes)
    ones = np.ones(len(blocks), np.float32)
    write_units(type, blocks, ones, ones)
    return Weight(f"all {byte:#x}", type, (18, 512), data)


def linear_case(weight: Weight, x: Float32s, bias: Float32s | None = None) -> Case:
    rows, cols = weight.shape
    return Case(
        f"{weight.type.name} {weight.name} [{rows}, {cols}] by {len(x)}",
        "linear",
        (int(weight.type), rows, cols, len(x)),
        (weight.data, x) if bias is None else (weight.data, x, bias),
        linear_int8(weight, x, bias),
    )


def expert_cases() -> Iterator[Case]:
    x, experts, counts = random_rows(27, 256), (4, 0, 3, 1), (1, 0, 6, 20)
    for type in (GGUFType.F16, GGUFType.Q8_0, GGUFType.Q4_K, GGUFType.MXFP4):
        stack, parts, start = random_stack(type, 5, 21, 256), [], 0
        for expert, count in zip(experts, counts, strict=True):
            if count == 0:
                continue
            part = stack.part(expert, expert + 1)
            matrix = Weight(part.name, part.type, part.shape[1:], part.data)
            parts.append(linear_int8(matrix, x[start : start + count]))
            start += count
        numbers = (int(type), 5, 21, 256, len(x), len(experts))
        buffers = (stack.data, x, np.array(experts), np.array(counts))
        yield Case(f"experts of {type.name}", "linear_experts", numbers, buffers, np.vstack(parts))


def row_cases() -> Iterator[Case]:
    """Rows as floats, of blocks of any bytes."""
    rng, ids = np.random.default_rng(5), np.array([8, 0, 0, 3])
    for type in GGUFType:
        cols = ragged_cols(type)
        size = 9 * cols // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
        weight = Weight("any", type, (9, cols), rng.integers(0, 256, size, np.uint8))
        numbers = (int(type), 9, cols, len(ids))
        yield Case(f"rows of {type.name}", "rows", numbers, (weight.data, ids), dequantize_rows(weight, ids))


def elementwise_cases() -> Iterator[Case]:
    for n, dim in ((1, 1), (3, 31), (5, 1000)):
        x, y = random_rows(n, dim) * 9, random_rows(n, dim, seed=2)
        yield _elementwise("swiglu", x, y, TWIN.swiglu(x, y))
        yield _elementwise("geglu", x, y, TWIN.geglu(x, y))
        yield _elementwise("add", x, y, x + y)
        for eps in (1e-5, 1e-6):
            numbers = n, dim, bits_of(eps)
            yield Case(f"rms_norm [{n}, {dim}]", "rms_norm", numbers, (x, y[0]), TWIN.rms_norm(x, y[0], eps))
    far = np.array([[-1e30, -200, -87.5, 0, 88.5, 200, 1e30, np.inf, np.nan]], np.float32)
    with np.errstate(invalid="ignore"):
        yield _elementwise("swiglu", far, np.ones_like(far), TWIN.swiglu(far, np.ones_like(far)))
        yield _elementwise("geglu", far, np.ones_like(far), TWIN.geglu(far, np.ones_like(far)))


def _elementwise(operation: str, x: Float32s, y: Float32s, expected: Float32s) -> Case:
    return Case(f"{operation} {x.shape}", operation, (x.size,), (x, y), expected)


def rope_cases() -> Iterator[Case]:
    for (head_dim, half), neox in product(((8, 4), (64, 32), (20, 5)), (False, True)):
        x, angles = random_rows(3, 2 * head_dim).reshape(3, 2, head_dim), random_rows(3, half, seed=4)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = (
            (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        turned, a, b = x.copy(), x[:, :, first], x[:, :, second]
        turned[:, :, first] = a * cos[:, None] - b * sin[:, None]
        turned[:, :, second] = a * sin[:, None] + b * cos[:, None]
        yield Case(f"rope {head_dim} {half} {neox}", "rope", (3, 2, head_dim, half, neox), (x, cos, sin), turned)


def attention_cases() -> Iterator[Case]:
    """Shared and own K/V heads, windows and soft caps, decoding and prefill; 290 positions."""
    shapes = ((KvType.F16, 20), (KvType.F32, 20), (KvType.F16, 64), (KvType.F32, 32), (KvType.Q8_0, 64))
    for (type, head_dim), rule, n_heads in product(shapes, RULES, (2, 6)):
        for start, stop in ((0, 33), (70, 71), (250, 290)):
            yield _attention_case(type, head_dim, rule, n_heads, start, stop)


def _attention_case(type: KvType, head_dim: int, rule: AttentionRule, n_heads: int, start: int, stop: int) -> Case:
    q, k, v = (random_rows(290, n * head_dim, seed=s) for s, n in enumerate((n_heads, 2, 2)))
    room = _room(type, head_dim)
    write(room, Chunk(0, 0, 290), k, v)
    numbers = (
        *(KV_CODE[type], 2, 300, head_dim),
        *(stop - start, n_heads, start, rule.window, bits_of(rule.scale), bits_of(rule.softcap)),
    )
    rows = slice(start, stop)
    # The twin writes the rows' K and V once more, and attends to what it wrote.
    again = _room(type, head_dim)
    write(again, Chunk(0, 0, 290), k, v)
    chunk = Chunk(0, start, stop - start)
    at = Pass(((0, stop - start, chunk),), {0: {0: again}}, head_dim)
    expected = TWIN.attention(q[rows], k[rows], v[rows], 0, at, rule)
    name = f"attention {type.name} {head_dim} {rule} {n_heads} heads, {start} to {stop}"
    return Case(name, "attention", numbers, (q[rows], room.k, room.v), expected)


def kv_write_cases() -> Iterator[Case]:
    for type, head_dim in ((KvType.F32, 20), (KvType.F16, 20), (KvType.F16, 64), (KvType.Q8_0, 64)):
        k = random_rows(4, 2 * head_dim) * np.float32(10) ** np.random.default_rng(2).integers(-9, 6, (4, 1))
        k = k.astype(np.float32)
        k[0, :3], k[1, :head_dim] = (np.inf, np.nan, -0.0), 0
        room = _room(type, head_dim)
        before = room.k.copy()
        write(room, Chunk(0, 5, 4), k, k)
        yield Case(
            f"kv_write {type.name} {head_dim}", "kv_write", (KV_CODE[type], 2, 300, head_dim, 4, 5), (k, before), room.k
        )


def _room(type: KvType, head_dim: int) -> Room:
    def cache() -> Stored:
        if type is KvType.Q8_0:
            return np.zeros((2, 300, head_dim // 32 * 34), np.uint8)
        return np.zeros((2, 300, head_dim), np.float32 if type is KvType.F32 else np.float16)

    return Room(cache(), cache())


def all_cases() -> list[Case]:
    products = (product_cases, hostile_cases, expert_cases, row_cases)
    kinds = (*products, elementwise_cases, rope_cases, attention_cases, kv_write_cases)
    return [case for cases in kinds for case in cases()]
