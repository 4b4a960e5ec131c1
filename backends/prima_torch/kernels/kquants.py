"""Tiles of the K types (`block_q*_K` of ggml-common.h, 256 weights), from the planes of `planes.py`.

`tiles.py` says what the functions get and give.
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import bits, load4, load_unit, load_word


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
    unit = load_unit(d + at, mask)
    negated = -load_unit(dmin + at, mask)
    return bits(scale, 0, 6) * unit, bits(scale, 8, 6) * unit, bits(minimum, 0, 6) * negated, bits(minimum, 8, 6) * negated
