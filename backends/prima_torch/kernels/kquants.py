"""Tiles of the K types (`block_q*_K` of ggml-common.h, 256 weights), from the planes of `planes.py`.

`tiles.py` says what the functions get and give.
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import bits, load4, load_unit, load_word

# ---------------------------------------------------------------- four segments, of 16 bytes with four weights in each


@triton.jit
def load_q2_k(scales, qs, d, dmin, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 16 + segment * 4, mask)
    # Groups of 16 weights: two neighbours are those of the two segments of a half, the next two of the next part.
    half, shift = segment // 2, segment % 2 * 8
    first = load_word(scales + at * 4 + half * 2, mask) >> shift
    second = load_word(scales + at * 4 + half * 2 + 1, mask) >> shift
    unit, negated = load_unit(d + at + segment * 0, mask), -load_unit(dmin + at + segment * 0, mask)
    scale0, scale1, scale2, scale3 = _pairs(first, second, 0, 4, 0)
    minimum0, minimum1, minimum2, minimum3 = _pairs(first, second, 4, 4, 0)
    return (
        w0, w1, w2, w3,
        scale0 * unit, scale1 * unit, scale2 * unit, scale3 * unit,
        minimum0 * negated, minimum1 * negated, minimum2 * negated, minimum3 * negated,
    )  # fmt: skip


@triton.jit
def weight_q2_k(raw, P: tl.constexpr):
    code = bits(raw[P % 16 // 4], P % 4 * 8 + P // 16 * 2, 2)
    return tl.fma(code, raw[4 + P // 16], raw[8 + P // 16])


@triton.jit
def load_q3_k(hmask, qs, scales, d, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 16 + segment * 4, mask)
    half, side = segment // 2, segment % 2
    h0, h1, h2, h3 = load4(hmask + at * 8 + side * 4, mask)
    # Of the 6 bits of a scale, four are nibbles of eight bytes (one for each half), two are pairs of four bytes.
    shift = half * 4 + side * 8
    first = load_word(scales + at * 3 + half * 0, mask) >> shift
    second = load_word(scales + at * 3 + half * 0 + 1, mask) >> shift
    pairs = load_word(scales + at * 3 + half * 0 + 2, mask) >> shift
    first = (first & 0x000F000F) | ((pairs & 0x00030003) << 4)
    second = (second & 0x000F000F) | (((pairs >> 2) & 0x00030003) << 4)
    unit = load_unit(d + at + segment * 0, mask)
    scale0, scale1, scale2, scale3 = _pairs(first, second, 0, 6, 32)
    lift = half * 4
    return (
        w0, w1, w2, w3,
        h0 >> lift, h1 >> lift, h2 >> lift, h3 >> lift,
        scale0 * unit, scale1 * unit, scale2 * unit, scale3 * unit,
    )  # fmt: skip


@triton.jit
def weight_q3_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    low = (raw[WORD] >> (2 * PART)) & 0x03030303
    third = ((raw[4 + WORD] >> PART) & 0x01010101) << 2
    return bits(low | third, P % 4 * 8, 3, 4) * raw[8 + PART]


@triton.jit
def _pairs(first, second, AT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr):
    """Fields at AT and 16 bits further on, of both words."""
    return (
        bits(first, AT, WIDTH, OFFSET),
        bits(first, AT + 16, WIDTH, OFFSET),
        bits(second, AT, WIDTH, OFFSET),
        bits(second, AT + 16, WIDTH, OFFSET),
    )


# ---------------------------------------------------------------- eight segments, of 16 bytes with two weights in each


@triton.jit
def load_q4_k(d, dmin, scales, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 32 + segment * 4, mask)
    scale0, scale1, minimum0, minimum1 = _scales_and_minima(d, dmin, scales, at, segment // 2, mask)
    return w0, w1, w2, w3, scale0, scale1, minimum0, minimum1


@triton.jit
def weight_q4_k(raw, P: tl.constexpr):
    PART: tl.constexpr = P // 16
    code = bits(raw[P % 16 // 4], P % 4 * 8 + PART * 4, 4)
    return tl.fma(code, raw[4 + PART], raw[6 + PART])


@triton.jit
def load_q5_k(d, dmin, scales, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 32 + segment * 4, mask)
    run, side = segment // 2, segment % 2
    h0, h1, h2, h3 = load4(qh + at * 8 + side * 4, mask)
    scale0, scale1, minimum0, minimum1 = _scales_and_minima(d, dmin, scales, at, run, mask)
    shift = run * 2
    return w0, w1, w2, w3, scale0, scale1, minimum0, minimum1, h0 >> shift, h1 >> shift, h2 >> shift, h3 >> shift


@triton.jit
def weight_q5_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    nibbles = (raw[WORD] >> (4 * PART)) & 0x0F0F0F0F
    fifth = ((raw[8 + WORD] >> PART) & 0x01010101) << 4
    return tl.fma(bits(nibbles | fifth, P % 4 * 8, 5), raw[4 + PART], raw[6 + PART])


@triton.jit
def load_q6_k(ql, qh, scales, d, at, segment, mask):
    w0, w1, w2, w3 = load4(ql + at * 32 + segment * 4, mask)
    half, quarter = segment // 4, segment % 4
    h0, h1, h2, h3 = load4(qh + at * 16 + half * 8 + quarter % 2 * 4, mask)
    shift = quarter // 2 * 2
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080: adds 128 to signed bytes
    low_scales = (load_word(scales + at * 4 + half * 2, mask) ^ FLIP) >> (quarter * 8)
    high_scales = (load_word(scales + at * 4 + half * 2 + 1, mask) ^ FLIP) >> (quarter * 8)
    unit = load_unit(d + at + segment * 0, mask)
    scale0, scale1 = bits(low_scales, 0, 8, 128) * unit, bits(high_scales, 0, 8, 128) * unit
    return w0, w1, w2, w3, scale0, scale1, h0 >> shift, h1 >> shift, h2 >> shift, h3 >> shift


@triton.jit
def weight_q6_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    nibbles = (raw[WORD] >> (4 * PART)) & 0x0F0F0F0F
    pairs = ((raw[6 + WORD] >> (4 * PART)) & 0x03030303) << 4
    return bits(nibbles | pairs, P % 4 * 8, 6, 32) * raw[4 + PART]


@triton.jit
def _scales_and_minima(d, dmin, scales, at, run, mask):
    """Scales of the two groups of 32 in `run`, one of four runs of 64, then their minima, negated."""
    at = at + run * 0
    shift = run % 2 * 16
    low_scales = load_word(scales + at * 3, mask) >> shift
    low_minima = load_word(scales + at * 3 + 1, mask) >> shift
    rest = load_word(scales + at * 3 + 2, mask) >> shift
    is_low = run < 2
    scale = tl.where(is_low, low_scales & 0x3F3F, (rest & 0x0F0F) | ((low_scales >> 2) & 0x3030))
    minimum = tl.where(is_low, low_minima & 0x3F3F, ((rest >> 4) & 0x0F0F) | ((low_minima >> 2) & 0x3030))
    unit, negated = load_unit(d + at, mask), -load_unit(dmin + at, mask)
    return (
        bits(scale, 0, 6) * unit,
        bits(scale, 8, 6) * unit,
        bits(minimum, 0, 6) * negated,
        bits(minimum, 8, 6) * negated,
    )
