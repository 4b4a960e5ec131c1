"""Tiles of the types with 32 weights in a block (`block_q*_0`, `block_q*_1` of ggml-common.h).

`tiles.py` says what the functions get and give.
"""

import triton
import triton.language as tl

from prima_torch.kernels.bits import bits, load4, load_unit


@triton.jit
def load_q8_0(d, qs, at, segment, mask):
    w0, w1, w2, w3 = load4(qs + at * 8 + segment * 4, mask)
    FLIP: tl.constexpr = -0x7F7F7F80  # 0x80808080: adds 128 to signed bytes
    return w0 ^ FLIP, w1 ^ FLIP, w2 ^ FLIP, w3 ^ FLIP, load_unit(d + at + segment * 0, mask)


@triton.jit
def weight_q8_0(raw, P: tl.constexpr):
    return bits(raw[P // 4], P % 4 * 8, 8, 128) * raw[4]
