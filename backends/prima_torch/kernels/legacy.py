"""Tiles of the types with 32 weights in a block (`block_q*_0`, `block_q*_1` of ggml-common.h).

`tiles.py` says what the functions get and give. A lane has a whole block (half of one of Q8_0).
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import SHRINK, load4, load_unit, load_word, weigh


@triton.jit
def load_q4_0(d, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    unit = load_unit(d + at, mask)
    return w0, w1, w2, w3, unit, unit * (-8 * SHRINK)


@triton.jit
def load_q4_1(d, m, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, load_unit(d + at, mask), load_unit(m + at, mask) * SHRINK


@triton.jit
def weight_q4(raw, P: tl.constexpr):
    return weigh(raw[P % 16 // 4], P % 4 * 8 + P // 16 * 4, 4, raw[4], raw[5])


@triton.jit
def load_q5_0(d, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    unit = load_unit(d + at, mask)
    return w0, w1, w2, w3, unit, unit * (-16 * SHRINK), load_word(qh + at, mask)


@triton.jit
def load_q5_1(d, m, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    unit, addend = load_unit(d + at, mask), load_unit(m + at, mask) * SHRINK
    return w0, w1, w2, w3, unit, addend, load_word(qh + at, mask)


@triton.jit
def weight_q5(raw, P: tl.constexpr):
    nibbles = (raw[P % 16 // 4] >> (P // 16 * 4)) & 0x0F0F0F0F
    # A product spreads four fifth bits over the bytes: of copies 7 bits apart, one brings bit i to bit 8 i + 4.
    fifth = (((raw[6] >> (P // 4 * 4)) & 15) * 0x02040810) & 0x10101010
    return weigh(nibbles | fifth, P % 4 * 8, 5, raw[4], raw[5])


@triton.jit
def load_q8_0(d, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 8 + segment * 4, mask)
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080: adds 128 to signed bytes
    unit = load_unit(d + at + segment * 0, mask)
    return w0 ^ FLIP, w1 ^ FLIP, w2 ^ FLIP, w3 ^ FLIP, unit, unit * (-128 * SHRINK)


@triton.jit
def weight_q8_0(raw, P: tl.constexpr):
    return weigh(raw[P // 4], P % 4 * 8, 8, raw[4], raw[5])
