"""Tiles of the types whose codes stand for levels in a table: IQ1 to IQ4 and MXFP4 (`block_iq*`, `block_mxfp4` of
ggml-common.h). The tables are those of `tables.py`.

`tiles.py` says what the functions get and give. Where blocks have 256 weights a segment is a run of 32 of them. Every
product here is exact in float32, so that weights have the bits of ggml's reference.
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import SHRINK, load4, load_unit, load_word, number, weigh


@triton.jit
def load(TYPE: tl.constexpr, f0, f1, f2, f3, f4, table, at, segment, mask):
    at = at + segment * 0
    if TYPE == "IQ1_S":
        return load_iq1_s(f0, f1, f2, table, at, segment, mask)
    elif TYPE == "IQ1_M":
        return load_iq1_m(f0, f1, f2, table, at, segment, mask)
    elif TYPE == "IQ2_XXS":
        return load_iq2_xxs(f0, f1, table, at, segment, mask)
    elif TYPE == "IQ2_XS":
        return load_iq2_xs(f0, f1, f2, table, at, segment, mask)
    elif TYPE == "IQ2_S":
        return load_iq2_s(f0, f1, f2, f3, table, at, segment, mask)
    elif TYPE == "IQ3_XXS":
        return load_iq3_xxs(f0, f1, table, at, segment, mask)
    elif TYPE == "IQ3_S":
        return load_iq3_s(f0, f1, f2, f3, f4, table, at, segment, mask)
    elif TYPE == "IQ4_NL":
        return load_iq4_nl(f0, f1, table, at, segment, mask)
    elif TYPE == "IQ4_XS":
        return load_iq4_xs(f0, f1, f2, f3, table, at, segment, mask)
    elif TYPE == "MXFP4":
        return load_mxfp4(f0, f1, table, at, segment, mask)
    else:
        tl.static_assert(False, "no such type")


@triton.jit
def weight(TYPE: tl.constexpr, raw, P: tl.constexpr):
    if TYPE == "IQ1_S" or TYPE == "IQ1_M":
        return weight_iq1(raw, P)
    elif TYPE == "IQ4_NL" or TYPE == "IQ4_XS" or TYPE == "MXFP4":
        return weight_iq4(raw, P)
    else:
        return weight_signed(raw, P)


# ---------------------------------------------------------------- 16 levels: words, table, scale


@triton.jit
def load_iq4_nl(d, qs, table, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    return w0, w1, w2, w3, table, load_unit(d + at, mask)


@triton.jit
def load_mxfp4(e, qs, table, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 4, mask)
    exponent = load_word(e + at, mask).to(tl.int32)  # of twice the unit; the lowest two units are subnormal
    unit = tl.where(exponent < 2, 0x200000 << (exponent & 1), (exponent - 1) << 23)
    return w0, w1, w2, w3, table, unit.to(tl.float32, bitcast=True)


@triton.jit
def load_iq4_xs(d, scales_h, scales_l, qs, table, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 32 + segment * 4, mask)
    low = load_word(scales_l + at, mask) >> (4 * segment)
    high = load_word(scales_h + at, mask).to(tl.int32) >> (2 * segment)
    scale = (low & 15 | (high & 3) << 4) - 32
    return w0, w1, w2, w3, table, load_unit(d + at, mask) * scale.to(tl.float32)


@triton.jit
def weight_iq4(raw, P: tl.constexpr):
    code = raw[P % 16 // 4] >> (P % 4 * 8 + P // 16 * 4) & 15
    return tl.load(raw[4] + code) * raw[5]


# ---------------------------------------------------------------- three levels and an offset


@triton.jit
def load_iq1_s(d, qs, qh, table, at, segment, mask):
    low = load_word(qs + at * 8 + segment, mask)
    high = load_word(qh + at * 4 + segment // 2, mask) >> (segment % 2 * 16)
    scale = load_unit(d + at, mask) * (0.125 * (2 * number(high, 12, 3) + 1))
    e0, e1, e2, e3 = _iq1_entries(table, low, high & 7, high >> 3 & 7, high >> 6 & 7, high >> 9 & 7)
    offset = _iq1_offset(scale, high, 0x8000)
    return e0, e1, e2, e3, 8 * scale, 8 * scale, offset, offset, offset, offset


@triton.jit
def load_iq1_m(qs, qh, scales, table, at, segment, mask):
    low = load_word(qs + at * 8 + segment, mask)
    high = load_word(qh + at * 4 + segment // 2, mask) >> (segment % 2 * 16)
    first, second = load_word(scales + at * 2, mask), load_word(scales + at * 2 + 1, mask)
    own = tl.where(segment < 4, first, second) >> (segment // 2 % 2 * 16 + segment % 2 * 6)
    d = _iq1_m_unit(first, second)
    scale0 = d * (2 * number(own, 0, 3) + 1)
    scale1 = d * (2 * number(own, 3, 3) + 1)
    offset0, offset1 = _iq1_offset(scale0, high, 0x8), _iq1_offset(scale0, high, 0x80)
    offset2, offset3 = _iq1_offset(scale1, high, 0x800), _iq1_offset(scale1, high, 0x8000)
    e0, e1, e2, e3 = _iq1_entries(table, low, high & 7, high >> 4 & 7, high >> 8 & 7, high >> 12 & 7)
    return e0, e1, e2, e3, 8 * scale0, 8 * scale1, offset0, offset1, offset2, offset3


@triton.jit
def _iq1_offset(scale, word, MINUS: tl.constexpr):
    """What is added to a level, 1 or where the bit is set -1, and the lowest level, -8: codes count from 0."""
    return tl.where((word & MINUS) == 0, -7 * SHRINK, -9 * SHRINK) * scale


@triton.jit
def _iq1_m_unit(first, second):
    """An eighth of the float16 whose nibbles lead the four half words."""
    low = first >> 12 & 0xF | first >> 24 & 0xF0
    high = second >> 4 & 0xF00 | second >> 16 & 0xF000
    return (low | high).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 0.125


@triton.jit
def _iq1_entries(table, low, h0, h1, h2, h3):
    """Four entries of eight times 2 bits, by eight bits of `low` and three more."""
    e0 = tl.load(table + (low & 255 | h0 << 8)).to(tl.int32)
    e1 = tl.load(table + (low >> 8 & 255 | h1 << 8)).to(tl.int32)
    e2 = tl.load(table + (low >> 16 & 255 | h2 << 8)).to(tl.int32)
    e3 = tl.load(table + (low >> 24 & 255 | h3 << 8)).to(tl.int32)
    return e0, e1, e2, e3


@triton.jit
def weight_iq1(raw, P: tl.constexpr):
    return weigh(raw[P // 8], P % 8 * 2, 2, raw[4 + P // 16], raw[6 + P // 8])


# ---------------------------------------------------------------- levels and signs: eight words, a bit each, two scales


@triton.jit
def load_iq2_xxs(d, qs, table, at, segment, mask):
    index = load_word(qs + at * 16 + segment * 2, mask)
    packed = load_word(qs + at * 16 + segment * 2 + 1, mask)
    scale = load_unit(d + at, mask) * (0.125 * (2 * number(packed, 28, 4) + 1))
    l0, l1, l2, l3, l4, l5, l6, l7 = _iq2_entries(
        table, index & 255, index >> 8 & 255, index >> 16 & 255, index >> 24 & 255
    )
    return l0, l1, l2, l3, l4, l5, l6, l7, _even_signs(packed), scale, scale


@triton.jit
def load_iq2_xs(d, qs, scales, table, at, segment, mask):
    first = load_word(qs + at * 16 + segment * 2, mask)
    second = load_word(qs + at * 16 + segment * 2 + 1, mask)
    signs = first >> 9 & 0x7F | first >> 18 & 0x3F80 | (second >> 9 & 0x7F) << 14 | (second >> 18 & 0x3F80) << 14
    scale0, scale1 = _two_scales(d, scales, at, segment, mask)
    l0, l1, l2, l3, l4, l5, l6, l7 = _iq2_entries(
        table, first & 511, first >> 16 & 511, second & 511, second >> 16 & 511
    )
    return l0, l1, l2, l3, l4, l5, l6, l7, _even_signs(signs), scale0, scale1


@triton.jit
def load_iq2_s(d, qs, qh, scales, table, at, segment, mask):
    low = load_word(qs + at * 16 + segment, mask)
    signs = load_word(qs + at * 16 + 8 + segment, mask)
    high = load_word(qh + at * 2 + segment // 4, mask) >> (segment % 4 * 8)
    scale0, scale1 = _two_scales(d, scales, at, segment, mask)
    l0, l1, l2, l3, l4, l5, l6, l7 = _iq2_entries(
        table,
        low & 255 | (high & 3) << 8,
        low >> 8 & 255 | (high >> 2 & 3) << 8,
        low >> 16 & 255 | (high >> 4 & 3) << 8,
        low >> 24 & 255 | (high >> 6 & 3) << 8,
    )
    return l0, l1, l2, l3, l4, l5, l6, l7, signs, scale0, scale1


@triton.jit
def load_iq3_xxs(d, qs, table, at, segment, mask):
    first = load_word(qs + at * 24 + segment * 2, mask)
    second = load_word(qs + at * 24 + segment * 2 + 1, mask)
    packed = load_word(qs + at * 24 + 16 + segment, mask)
    scale = load_unit(d + at, mask) * (0.25 * (2 * number(packed, 28, 4) + 1))
    l0, l1, l2, l3 = _iq3_entries(table, first, segment * 0)
    l4, l5, l6, l7 = _iq3_entries(table, second, segment * 0)
    return l0, l1, l2, l3, l4, l5, l6, l7, _even_signs(packed), scale, scale


@triton.jit
def load_iq3_s(d, qs, qh, signs, scales, table, at, segment, mask):
    first = load_word(qs + at * 16 + segment * 2, mask)
    second = load_word(qs + at * 16 + segment * 2 + 1, mask)
    high = load_word(qh + at * 2 + segment // 4, mask) >> (segment % 4 * 8)
    scale = load_unit(d + at, mask) * (2 * number(load_word(scales + at, mask) >> (segment * 4), 0, 4) + 1)
    l0, l1, l2, l3 = _iq3_entries(table, first, high)
    l4, l5, l6, l7 = _iq3_entries(table, second, high >> 4)
    return l0, l1, l2, l3, l4, l5, l6, l7, load_word(signs + at * 8 + segment, mask), scale, scale


@triton.jit
def weight_signed(raw, P: tl.constexpr):
    """As `weigh`, with the sign in the subnormal."""
    AT: tl.constexpr = P % 2 * 8
    word = raw[P // 4] >> 16 if P % 4 > 1 else raw[P // 4]
    level = word & (0xFF << AT) | raw[8] << (31 - P) & -0x80000000
    return level.to(tl.float32, bitcast=True) * (raw[9 + P // 16] * 2.0 ** (101 - AT))


@triton.jit
def _two_scales(d, scales, at, segment, mask):
    """Of both halves of a segment, in a byte."""
    packed = load_word(scales + at * 2 + segment // 4, mask) >> (segment % 4 * 8)
    unit = load_unit(d + at, mask) * 0.125
    return unit * (2 * number(packed, 0, 4) + 1), unit * (2 * number(packed, 4, 4) + 1)


@triton.jit
def _iq2_entries(table, i0, i1, i2, i3):
    """Four entries of eight bytes, as eight words."""
    e0, e1, e2, e3 = tl.load(table + i0), tl.load(table + i1), tl.load(table + i2), tl.load(table + i3)
    l0, l2, l4, l6 = e0.to(tl.int32), e1.to(tl.int32), e2.to(tl.int32), e3.to(tl.int32)
    l1, l3, l5, l7 = (e0 >> 32).to(tl.int32), (e1 >> 32).to(tl.int32), (e2 >> 32).to(tl.int32), (e3 >> 32).to(tl.int32)
    return l0, l1, l2, l3, l4, l5, l6, l7


@triton.jit
def _iq3_entries(table, low, high):
    """Four entries of four bytes, by eight bits of `low` and one of `high` each."""
    e0 = tl.load(table + (low & 255 | (high & 1) << 8))
    e1 = tl.load(table + (low >> 8 & 255 | (high >> 1 & 1) << 8))
    e2 = tl.load(table + (low >> 16 & 255 | (high >> 2 & 1) << 8))
    e3 = tl.load(table + (low >> 24 & 255 | (high >> 3 & 1) << 8))
    return e0, e1, e2, e3


@triton.jit
def _even_signs(packed):
    """32 signs from four times 7: the eighth makes the number of minus signs even (`ksigns_iq2xs`)."""
    signs = packed & 0x7F | (packed & 0x3F80) << 1 | (packed & 0x1FC000) << 2 | (packed & 0xFE00000) << 3
    folded = signs ^ signs >> 4  # the lowest bit of each byte becomes the parity of all
    folded = folded ^ folded >> 2
    folded = folded ^ folded >> 1
    return signs | (folded & 0x01010101) << 7
