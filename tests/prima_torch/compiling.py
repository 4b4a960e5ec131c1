"""Run as a program: what the kernels' callers launch on CPU tensors is compiled for a GPU, which need not be there.

    python -m tests.prima_torch.compiling COMPUTE_CAPABILITY PART

Prints the name of each kernel and the bytes of shared memory that it takes.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import KvType
from prima_core.model.quant import BLOCKS
from prima_core.model.rope import RopeKind
from prima_torch.kernels import attention, elementwise, kv_write, routing, tiles
from prima_torch.kernels.shapes import SHAPES, pointers
from prima_torch.kernels.tables import table
from prima_torch.planes import split
from tests.prima_torch.paged import empty_pool

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands for `JITFunction.run`."""
    options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    constants = {param.name: bound[param.name] for param in kernel.params if param.is_constexpr}
    signature = {name: "constexpr" if name in constants else _type(value) for name, value in bound.items()}
    numbers = {name: (kernel.arg_names.index(name),) for name in bound}
    aligned = {numbers[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {numbers[name]: value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(kernel.fn.__name__, compiled.metadata.shared, flush=True)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 1 << 31 else "i64"


def launch_attention(type: KvType, group: int, head_dim: int, rule: AttentionRule) -> None:
    pool, q = empty_pool(type, 3, 2, head_dim), torch.zeros(2, 2 * group * head_dim)
    table, lengths = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    k, scales = pool.values, pool.scales
    attention.decode_attention(q, k, k, table, lengths, rule, 2, 300, scales, scales)
    kv_write.write_kv(q, k, scales, torch.zeros(2, dtype=torch.int64))


def launch_others() -> None:
    x = torch.zeros(2, 4096)
    elementwise.rms_norm(x, x[0], 1e-5)
    elementwise.swiglu(x, x)
    elementwise.geglu(x, x)
    for kind in RopeKind:
        elementwise.rope(x, Rope(kind, 128, x[:, :40], x[:, :40]))
    _, weights = routing.route(x[:, :60].contiguous(), RoutingRule(6))
    routing.mix(torch.zeros(12, 4096), weights)


def launch_attentions() -> None:
    launch_attention(KvType.F16, 4, 128, AttentionRule(1.0))
    launch_attention(KvType.F32, 1, 80, AttentionRule(1.0, softcap=50.0))


def launch_large_attentions() -> None:
    launch_attention(KvType.Q8_0, 17, 96, AttentionRule(1.0, window=100))
    launch_attention(KvType.F32, 16, 256, AttentionRule(1.0))


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def few_weights(f0, f1, f2, f3, f4, book, out, TYPE: tl.constexpr, SEGMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A whole kernel takes longer to compile than all of these."""
    segment = tl.arange(0, SEGMENTS)[None, None, :]
    at = tl.zeros((1, 32 // SEGMENTS, 1), tl.int64)
    raw = tiles.load(TYPE, f0, f1, f2, f3, f4, book, at, segment, at == 0)
    for p in tl.static_range(0, 32, 5):
        tl.store(out + segment * 32 + p + at, tiles.weight(TYPE, raw, p))


def launch_iquants() -> None:
    for type, shape in SHAPES.items():
        if table(type, torch.device("cpu")) is not None:
            n_bytes = 512 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
            matrix = split(type, 1, 512, torch.zeros(n_bytes, dtype=torch.uint8))
            few_weights[(1,)](*pointers(matrix), torch.zeros(256), TYPE=type.name, SEGMENTS=shape.segments)


PARTS = {
    "attention": launch_attentions,
    "large attention": launch_large_attentions,
    "others": launch_others,
    "iquants": launch_iquants,
}

if __name__ == "__main__":
    JITFunction.run = compile_launch
    PARTS[sys.argv[2]]()
