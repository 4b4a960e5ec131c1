"""Tiles of the K types (`block_q*_K` of ggml-common.h, 256 weights), from the planes of `planes.py`.

`tiles.py` says what the functions get and give.
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import SHRINK, load4, load_unit, load_word, number, weigh

# ---------------------------------------------------------------- four segments, of 16 bytes with four weights in each


@triton.jit
def load_q2_k(scales, qs, d, dmin, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 16 + segment * 4, mask)
    # Scales of groups of 16: of two neighbours, one is for each segment of a half; the next two are for the next part.
    half, shift = segment // 2, segment % 2 * 8
    first = load_word(scales + at * 4 + half * 2, mask) >> shift
    second = load_word(scales + at * 4 + half * 2 + 1, mask) >> shift
    unit, lift = load_unit(d + at + segment * 0, mask), load_unit(dmin + at + segment * 0, mask) * -SHRINK
    return (
        w0, w1, w2, w3,
        number(first, 0, 4) * unit, number(first, 16, 4) * unit,
        number(second, 0, 4) * unit, number(second, 16, 4) * unit,
        number(first, 4, 4) * lift, number(first, 20, 4) * lift,
        number(second, 4, 4) * lift, number(second, 20, 4) * lift,
    )  # fmt: skip


@triton.jit
def weight_q2_k(raw, P: tl.constexpr):
    return weigh(raw[P % 16 // 4], P % 4 * 8 + P // 16 * 2, 2, raw[4 + P // 16], raw[8 + P // 16])


@triton.jit
def load_q3_k(hmask, qs, scales, d, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 16 + segment * 4, mask)
    half, side = segment // 2, segment % 2
    h0, h1, h2, h3 = load4(hmask + at * 8 + side * 4, mask)
    # Of a scale's 6 bits, four are a nibble of eight bytes (low for the first half), two are in the last four bytes.
    shift = half * 4 + side * 8
    first = load_word(scales + at * 3 + half * 0, mask) >> shift
    second = load_word(scales + at * 3 + half * 0 + 1, mask) >> shift
    pairs = load_word(scales + at * 3 + half * 0 + 2, mask) >> shift
    first = (first & 0x000F000F) | ((pairs & 0x00030003) << 4)
    second = (second & 0x000F000F) | (((pairs >> 2) & 0x00030003) << 4)
    unit = load_unit(d + at + segment * 0, mask)
    scale0, scale1 = (number(first, 0, 6) - 32) * unit, (number(first, 16, 6) - 32) * unit
    scale2, scale3 = (number(second, 0, 6) - 32) * unit, (number(second, 16, 6) - 32) * unit
    shift = half * 4
    return (
        w0, w1, w2, w3,
        h0 >> shift, h1 >> shift, h2 >> shift, h3 >> shift,
        scale0, scale1, scale2, scale3,
        scale0 * (-4 * SHRINK), scale1 * (-4 * SHRINK), scale2 * (-4 * SHRINK), scale3 * (-4 * SHRINK),
    )  # fmt: skip


@triton.jit
def weight_q3_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    low = (raw[WORD] >> (2 * PART)) & 0x03030303
    third = ((raw[4 + WORD] >> PART) & 0x01010101) << 2
    return weigh(low | third, P % 4 * 8, 3, raw[8 + PART], raw[12 + PART])


# ---------------------------------------------------------------- eight segments, of 16 bytes with two weights in each


@triton.jit
def load_q4_k(d, dmin, scales, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 32 + segment * 4, mask)
    scale0, scale1, addend0, addend1 = _scales_and_addends(d, dmin, scales, at, segment // 2, mask)
    return w0, w1, w2, w3, scale0, scale1, addend0, addend1


@triton.jit
def weight_q4_k(raw, P: tl.constexpr):
    PART: tl.constexpr = P // 16
    return weigh(raw[P % 16 // 4], P % 4 * 8 + PART * 4, 4, raw[4 + PART], raw[6 + PART])


@triton.jit
def load_q5_k(d, dmin, scales, qh, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 32 + segment * 4, mask)
    run, side = segment // 2, segment % 2
    h0, h1, h2, h3 = load4(qh + at * 8 + side * 4, mask)
    scale0, scale1, addend0, addend1 = _scales_and_addends(d, dmin, scales, at, run, mask)
    shift = run * 2
    return w0, w1, w2, w3, scale0, scale1, addend0, addend1, h0 >> shift, h1 >> shift, h2 >> shift, h3 >> shift


@triton.jit
def weight_q5_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    nibbles = (raw[WORD] >> (4 * PART)) & 0x0F0F0F0F
    fifth = ((raw[8 + WORD] >> PART) & 0x01010101) << 4
    return weigh(nibbles | fifth, P % 4 * 8, 5, raw[4 + PART], raw[6 + PART])


@triton.jit
def load_q6_k(ql, qh, scales, d, at, segment, mask):
    w0, w1, w2, w3 = load4(ql + at * 32 + segment * 4, mask)
    half, quarter = segment // 4, segment % 4
    h0, h1, h2, h3 = load4(qh + at * 16 + half * 8 + quarter % 2 * 4, mask)
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080: adds 128 to signed bytes
    first = (load_word(scales + at * 4 + half * 2, mask) ^ FLIP) >> (quarter * 8)
    second = (load_word(scales + at * 4 + half * 2 + 1, mask) ^ FLIP) >> (quarter * 8)
    unit = load_unit(d + at + segment * 0, mask)
    scale0, scale1 = (number(first, 0, 8) - 128) * unit, (number(second, 0, 8) - 128) * unit
    addend0, addend1 = scale0 * (-32 * SHRINK), scale1 * (-32 * SHRINK)
    shift = quarter // 2 * 2
    return w0, w1, w2, w3, scale0, scale1, addend0, addend1, h0 >> shift, h1 >> shift, h2 >> shift, h3 >> shift


@triton.jit
def weight_q6_k(raw, P: tl.constexpr):
    WORD: tl.constexpr = P % 16 // 4
    PART: tl.constexpr = P // 16
    nibbles = (raw[WORD] >> (4 * PART)) & 0x0F0F0F0F
    pairs = ((raw[8 + WORD] >> (4 * PART)) & 0x03030303) << 4
    return weigh(nibbles | pairs, P % 4 * 8, 6, raw[4 + PART], raw[6 + PART])


@triton.jit
def _scales_and_addends(d, dmin, scales, at, run, mask):
    """Scales of the two groups of 32 in `run`, one of four runs of 64, then what their minima add."""
    at = at + run * 0
    shift = run % 2 * 16
    low_scales = load_word(scales + at * 3, mask) >> shift
    low_minima = load_word(scales + at * 3 + 1, mask) >> shift
    rest = load_word(scales + at * 3 + 2, mask) >> shift
    is_low = run < 2
    scale = tl.where(is_low, low_scales & 0x3F3F, (rest & 0x0F0F) | ((low_scales >> 2) & 0x3030))
    minimum = tl.where(is_low, low_minima & 0x3F3F, ((rest >> 4) & 0x0F0F) | ((low_minima >> 2) & 0x3030))
    unit, lift = load_unit(d + at, mask), load_unit(dmin + at, mask) * -SHRINK
    return (
        number(scale, 0, 6) * unit,
        number(scale, 8, 6) * unit,
        number(minimum, 0, 6) * lift,
        number(minimum, 8, 6) * lift,
    )
