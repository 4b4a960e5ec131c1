"""Tiles of floats: 16 bytes of a row in each lane. `tiles.py` says what the functions get and give."""

import triton
import triton.language as tl

from prima_torch.kernels.bits import load4, split4


@triton.jit
def load_f32(w, at, segment, mask):
    return load4(w + at * 4, mask)


@triton.jit
def load_half(w, at, segment, mask):
    """float16 or bfloat16"""
    item = tl.load((w + at * 8)[:, :, :, None] + tl.arange(0, 8), mask=mask[:, :, :, None], other=0.0)
    even, odd = tl.split(tl.reshape(item, (item.shape[0], item.shape[1], item.shape[2], 4, 2)))
    w0, w2, w4, w6 = split4(even)
    w1, w3, w5, w7 = split4(odd)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def weight(raw, P: tl.constexpr):
    return raw[P].to(tl.float32)
