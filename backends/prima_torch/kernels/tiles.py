"""Weights of every type as float32 in registers, for the kernels in `linear_kernels.py`: which lane holds which weight.

A program works on some neighbouring blocks of some rows at once. Each lane holds, of every row, the codes of one
*segment* (16 bytes where the type allows, so that loads are as wide as they can be): a warp's 32 lanes have
blocks * segments = 32, and nothing is ever moved between lanes. The weights of a segment are not neighbours: a byte of
Q4_K holds one weight and the one 32 further on. `shapes.Shape` says where they stand, so that a lane loads just the
inputs that it needs.

For each type there are two functions of Triton:
- `load_TYPE(field, ..., at, segment, mask)` loads what a segment needs: `at` int64 [rows, blocks, 1] numbers the block
  in the planes, `segment` is int32 [1, 1, segments], `mask` [1, blocks, 1] says which blocks exist; fields are pointers
  as `shapes.pointers` gives them. Returns a tuple of tensors [rows, blocks, segments], of words and scales.
- `weight_TYPE(raw, P)` takes weight P of each segment out of that tuple: float32 [rows, blocks, segments], 0 where
  masked, divided by `unit(TYPE)`. P is a constant: the loop over it is unrolled.

Both must give every lane its own values only: reshape, split and arithmetic, no tensor of another shape. That the
compiler keeps to it shows in the shared memory that a kernel takes: only sums of warps and lanes at the end need any.
"""

import triton
import triton.language as tl

from prima_torch.kernels import floats, iquants, kquants, legacy
from prima_torch.kernels.bits import GROW


@triton.jit
def load(TYPE: tl.constexpr, f0, f1, f2, f3, f4, table, at, segment, mask):
    """`load_TYPE`; f0 to f4 are the fields in the order of the planes, `table` the codebook of a type that has one."""
    if TYPE == "F32":
        return floats.load_f32(f0, at, segment, mask)
    elif TYPE == "F16" or TYPE == "BF16":
        return floats.load_half(f0, at, segment, mask)
    elif TYPE == "Q4_0":
        return legacy.load_q4_0(f0, f1, at, segment, mask)
    elif TYPE == "Q4_1":
        return legacy.load_q4_1(f0, f1, f2, at, segment, mask)
    elif TYPE == "Q5_0":
        return legacy.load_q5_0(f0, f1, f2, at, segment, mask)
    elif TYPE == "Q5_1":
        return legacy.load_q5_1(f0, f1, f2, f3, at, segment, mask)
    elif TYPE == "Q8_0":
        return legacy.load_q8_0(f0, f1, at, segment, mask)
    elif TYPE == "Q2_K":
        return kquants.load_q2_k(f0, f1, f2, f3, at, segment, mask)
    elif TYPE == "Q3_K":
        return kquants.load_q3_k(f0, f1, f2, f3, at, segment, mask)
    elif TYPE == "Q4_K":
        return kquants.load_q4_k(f0, f1, f2, f3, at, segment, mask)
    elif TYPE == "Q5_K":
        return kquants.load_q5_k(f0, f1, f2, f3, f4, at, segment, mask)
    elif TYPE == "Q6_K":
        return kquants.load_q6_k(f0, f1, f2, f3, at, segment, mask)
    else:
        return iquants.load(TYPE, f0, f1, f2, f3, f4, table, at, segment, mask)


@triton.jit
def weight(TYPE: tl.constexpr, raw, P: tl.constexpr):
    if TYPE == "F32" or TYPE == "F16" or TYPE == "BF16":
        return floats.weight(raw, P)
    elif TYPE == "Q4_0" or TYPE == "Q4_1":
        return legacy.weight_q4(raw, P)
    elif TYPE == "Q5_0" or TYPE == "Q5_1":
        return legacy.weight_q5(raw, P)
    elif TYPE == "Q8_0":
        return legacy.weight_q8_0(raw, P)
    elif TYPE == "Q2_K":
        return kquants.weight_q2_k(raw, P)
    elif TYPE == "Q3_K":
        return kquants.weight_q3_k(raw, P)
    elif TYPE == "Q4_K":
        return kquants.weight_q4_k(raw, P)
    elif TYPE == "Q5_K":
        return kquants.weight_q5_k(raw, P)
    elif TYPE == "Q6_K":
        return kquants.weight_q6_k(raw, P)
    else:
        return iquants.weight(TYPE, raw, P)


@triton.jit
def unit(TYPE: tl.constexpr):
    """What `weight` has to be multiplied by."""
    if TYPE == "F32" or TYPE == "F16" or TYPE == "BF16" or TYPE == "IQ4_NL" or TYPE == "IQ4_XS" or TYPE == "MXFP4":
        return 1.0
    else:
        return GROW
