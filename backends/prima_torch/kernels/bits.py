"""Words of packed codes to weights, in registers of a Triton kernel.

Kernels on fast memory are bound by instructions: about four for a weight are all there is time for. So no code is
converted to a float. `word & field << at` read as a float is a subnormal, exactly code * 2^(at - 149), and one fused
multiply-add makes a weight of it, where the scale makes up for the power of two. As 2^149 is too much for one float32,
weights come out times 2^-48; the kernels multiply their sums by 2^48. Both are exact, for any scale that float16 units
and integers make.

Whatever the shape: a lane keeps its own, nothing here moves data between lanes.
"""

import triton
import triton.language as tl

SHRINK = tl.constexpr(2.0**-48)
GROW = tl.constexpr(2.0**48)


@triton.jit
def weigh(word, AT: tl.constexpr, WIDTH: tl.constexpr, scale, addend):
    """(bits AT to AT + WIDTH - 1 of int32 `word`) * `scale` * 2^-48 + `addend`, rounded once. WIDTH <= 8."""
    if AT + WIDTH > 23:
        shifted = word >> 16  # what moves in from the left is masked
        return weigh(shifted, AT - 16, WIDTH, scale, addend)
    else:
        code = (word & (((1 << WIDTH) - 1) << AT)).to(tl.float32, bitcast=True)
        return tl.fma(code, scale * 2.0 ** (101 - AT), addend)


@triton.jit
def number(word, AT: tl.constexpr, WIDTH: tl.constexpr):
    """Bits AT to AT + WIDTH - 1 of int32 `word` as float32. For scales, of which there are few: it converts."""
    return ((word >> AT) & ((1 << WIDTH) - 1)).to(tl.float32)


@triton.jit
def load4(pointer, mask):
    """Four neighbours at each of `pointer` [rows, blocks, segments], a multiple of 16 bytes: four of that shape."""
    return split4(tl.load(pointer[:, :, :, None] + tl.arange(0, 4), mask=mask[:, :, :, None], other=0))


@triton.jit
def split4(item):
    """[..., 4] of four dimensions -> four [...]"""
    even, odd = tl.split(tl.reshape(item, (item.shape[0], item.shape[1], item.shape[2], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_word(pointer, mask):
    """What is at `pointer` [rows, blocks, segments]; each lane loads for itself."""
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def load_unit(pointer, mask):
    """The float16 at `pointer` [rows, blocks, segments], as float32."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
