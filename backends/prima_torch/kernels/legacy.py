"""Tiles of the types with 32 weights in a block (`block_q*_0`, `block_q*_1` of ggml-common.h).

`tiles.py` says what the functions get and give. A lane has a whole block (half of one of Q8_0).
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import bits, load4, load_unit, load_word


@triton.jit
def load_q4_0(d, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, load_unit(d + at, mask)


@triton.jit
def weight_q4_0(raw, P: tl.constexpr):
    return bits(raw[P % 16 // 4], P % 4 * 8 + P // 16 * 4, 4, 8) * raw[4]


@triton.jit
def load_q4_1(d, m, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, load_unit(d + at, mask), load_unit(m + at, mask)


@triton.jit
def weight_q4_1(raw, P: tl.constexpr):
    return tl.fma(bits(raw[P % 16 // 4], P % 4 * 8 + P // 16 * 4, 4), raw[4], raw[5])


@triton.jit
def load_q5_0(d, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, load_unit(d + at, mask), load_word(qh + at, mask)


@triton.jit
def weight_q5_0(raw, P: tl.constexpr):
    return bits(_with_fifth(raw[P % 16 // 4], raw[5], P // 4), P % 4 * 8, 5, 16) * raw[4]


@triton.jit
def load_q5_1(d, m, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, load_unit(d + at, mask), load_word(qh + at, mask), load_unit(m + at, mask)


@triton.jit
def weight_q5_1(raw, P: tl.constexpr):
    return tl.fma(bits(_with_fifth(raw[P % 16 // 4], raw[5], P // 4), P % 4 * 8, 5), raw[4], raw[6])


@triton.jit
def _with_fifth(word, fifth, FOUR: tl.constexpr):
    """Four codes of 5 bits in the bytes of a word, for weights 4 * FOUR and on.

    A product spreads their four bits of `fifth` over the bytes: copies 7 bits apart bring bit i to bit 8 i + 4.
    """
    nibbles = (word >> (FOUR // 4 * 4)) & 0x0F0F0F0F
    return nibbles | ((((fifth >> (FOUR * 4)) & 15) * 0x02040810) & 0x10101010)


@triton.jit
def load_q8_0(d, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 8 + segment * 4, mask)
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080: adds 128 to signed bytes
    return w0 ^ FLIP, w1 ^ FLIP, w2 ^ FLIP, w3 ^ FLIP, load_unit(d + at + segment * 0, mask)


@triton.jit
def weight_q8_0(raw, P: tl.constexpr):
    return bits(raw[P // 4], P % 4 * 8, 8, 128) * raw[4]
