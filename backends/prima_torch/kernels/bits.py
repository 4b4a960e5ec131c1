"""Words of packed codes to floats, in registers of a Triton kernel.

`(word & field << b) | exponent` is the float 2^(23 - b) + field for a field at bit b: an operation and a subtraction
where a conversion would take a slow one. Whatever the shape, a lane keeps its own: nothing here moves data between
lanes.
"""

import triton
import triton.language as tl


@triton.jit
def bits(word, AT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr = 0):
    """Bits AT to AT + WIDTH - 1 of int32 `word`, minus OFFSET, as float32, exactly. WIDTH <= 8."""
    if AT + WIDTH > 23:
        shifted = word >> 16  # what moves in from the left is masked
        return bits(shifted, AT - 16, WIDTH, OFFSET)
    else:
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << AT
        EXPONENT: tl.constexpr = (150 - AT) << 23
        BASE: tl.constexpr = (1 << (23 - AT)) + OFFSET
        return ((word & MASK) | EXPONENT).to(tl.float32, bitcast=True) - BASE


@triton.jit
def load4(pointer, mask):
    """Four neighbours at each of `pointer` [rows, blocks, segments], a multiple of 16 bytes: four of that shape."""
    item = tl.load(pointer[:, :, :, None] + tl.arange(0, 4), mask=mask[:, :, :, None], other=0)
    return split4(item)


@triton.jit
def split4(item):
    """[..., 4] -> four [...]"""
    pairs = tl.reshape(item, (item.shape[0], item.shape[1], item.shape[2], 2, 2))
    even, odd = tl.split(pairs)
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
