"""Random weights in memory, made fast, and a model of them: nothing of its file is ever on a disk."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from bench.memory_store import MemoryStore
from prima_core.arch.llama import llama_shapes
from prima_core.interfaces import Weight
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.model.rope import RopeSpec
from prima_core.model.spec import ModelSpec
from prima_core.testing.randomblocks import write_units
from prima_numpy.quant import dequantize

Bytes = NDArray[np.uint8]

FLOATS = (GGUFType.F32, GGUFType.F16, GGUFType.BF16)
POOL_WEIGHTS = 1 << 22
"""Weights of a tensor that are drawn; a larger one repeats them."""
_WHERE_BETTER = ("attn_v.weight", "ffn_down.weight")

LLAMA_8B = ModelSpec(
    "llama", "Llama-3-8B shape", n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
    vocab_size=128256, context_length=8192, norm_eps=1e-5, rope=RopeSpec(128, theta=500000.0), tied_output=False,
)  # fmt: skip
LLAMA_SMALL = replace(LLAMA_8B, name="small shape", n_layers=3, d_model=1024, n_heads=32, n_kv_heads=8, head_dim=32,
                      d_ff=2816, vocab_size=1000, rope=RopeSpec(32, theta=500000.0))  # fmt: skip
LLAMA_TINY = replace(
    LLAMA_SMALL, name="tiny shape", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8, vocab_size=8,
    rope=RopeSpec(8, theta=500000.0),
)  # fmt: skip
Q4_K_M = GGUFType.Q4_K, GGUFType.Q6_K
SMALL_BLOCKS = GGUFType.F16, GGUFType.F32
"""For the tiny shape, whose rows are shorter than other blocks."""


def random_weight(type: GGUFType, shape: tuple[int, ...], name: str = "w", std: float | None = None) -> Weight:
    """A tensor of random codes, about normal with mean 0; by default a product keeps the spread of its input. The same
    arguments give the same bytes."""
    rng = np.random.default_rng(crc32(f"{type.name} {shape} {name}".encode()))
    std = std or shape[-1] ** -0.5
    n_weights = min(prod(shape), POOL_WEIGHTS)
    pool = _floats(type, n_weights, std, rng) if type in FLOATS else _blocks(type, n_weights, std, rng)
    data = np.resize(pool, prod(shape) // BLOCKS[type].n_weights * BLOCKS[type].n_bytes)
    data.flags.writeable = False
    return Weight(name, type, shape, data)


def _floats(type: GGUFType, n: int, std: float, rng: np.random.Generator) -> Bytes:
    values = rng.standard_normal(n, np.float32) * np.float32(std)
    if type is GGUFType.BF16:
        return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8)
    return values.astype(np.float16 if type is GGUFType.F16 else np.float32).view(np.uint8)


def _blocks(type: GGUFType, n: int, std: float, rng: np.random.Generator) -> Bytes:
    """Units of either sign bring the mean to 0; how large they must be is seen from a sample."""
    block = BLOCKS[type]
    blocks = np.frombuffer(bytearray(rng.bytes(n // block.n_weights * block.n_bytes)), np.uint8)
    blocks = blocks.reshape(-1, block.n_bytes)
    signs = rng.choice(np.array([-1, 1], np.float32), (2, len(blocks)))
    sample = blocks[:4096]
    write_units(type, sample, *signs[:, :4096])
    spread = dequantize(type, sample.reshape(-1), (sample.size // block.n_bytes * block.n_weights,)).std()
    write_units(type, blocks, *(signs * np.float32(std / spread)))
    return blocks.reshape(-1)


def mixed(model: ModelSpec, types: tuple[GGUFType, GGUFType]) -> MemoryStore:
    """A llama in the mix of llama.cpp's Q4_K_M: all of the first type, but the output and, where its quantiser spends
    more bits, attn_v and ffn_down of the second."""
    first, second = types
    plain = {name: _tensor(first, shape, name) for name, shape in llama_shapes(model).items()}
    better = plain | {name: _tensor(second, plain[name].shape, name) for name in _WHERE_BETTER}
    table = model.vocab_size, model.d_model
    ends = {
        TOKEN_EMBD: random_weight(first, table, TOKEN_EMBD, std=1.0),
        OUTPUT_NORM: _gain(OUTPUT_NORM, model.d_model),
        OUTPUT: random_weight(second, table, OUTPUT),
    }
    # Each layer has a mapping of its own, as those of a file have.
    layers = [dict(better if _uses_more_bits(layer, model.n_layers) else plain) for layer in range(model.n_layers)]
    return MemoryStore(tuple(layers), ends)


def _uses_more_bits(layer: int, n_layers: int) -> bool:
    """`use_more_bits` of llama-quant.cpp."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def _tensor(type: GGUFType, shape: tuple[int, ...], name: str) -> Weight:
    return random_weight(type, shape, name) if len(shape) > 1 else _gain(name, shape[0])


def _gain(name: str, n: int) -> Weight:
    return Weight(name, GGUFType.F32, (n,), np.ones(n, np.float32).view(np.uint8))
