"""How fast the native products are, beside how fast the same threads read memory in the same run.

    python bench/kernels.py [--threads 1 2] [--variant auto] [--mib 512] [--types Q4_K Q5_K]

Decode rows: one activation row by matrices that do not fit in the caches; the ratio to plain reading is what counts,
absolute figures change with the neighbours on a machine. Prefill rows: many activation rows by one matrix.
Attention rows: one token of a layer shaped as Llama-3-8B's (32 heads that share 8), by type of K and V.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import KvKind, KvOp, KvType, Layers, Step, Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.kernels import Kernels
from prima_numpy.kv import NumpyKv

ROWS, COLS = 2048, 8192
# Random bits as BF16 or F32 would be products of all sizes, many of them subnormal and slow.
TYPES = [type for type in GGUFType if type not in (GGUFType.F32, GGUFType.BF16)]
MODEL_WEIGHTS = 1.236e9
"""Weights that a token of a Llama-3.2-1B reads, the tied output matrix included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--mib", type=int, default=512, help="memory that a decode pass walks through")
    names = [type.name for type in TYPES]
    parser.add_argument("--types", nargs="+", choices=names, default=names, metavar="TYPE")
    options = parser.parse_args()
    types = [GGUFType[name] for name in options.types]
    memory = np.random.default_rng(0).integers(0, 256, options.mib << 20, dtype=np.uint8)
    memory &= 0xBF  # so that every half that a block may hold is finite
    for threads in options.threads:
        kernels = Kernels(threads, options.variant)
        print(f"\n{kernels.variant}, {threads} thread(s), matrices {ROWS} x {COLS}")
        for type in types:
            decode(kernels, type, memory)
        for type in types:
            prefill(kernels, type, memory)
        for n_positions in (512, 8192):
            attention(kernels, n_positions)


def decode(kernels: Kernels, type: GGUFType, memory: NDArray[np.uint8]) -> None:
    weights = matrices(type, memory)
    x = np.random.default_rng(1).standard_normal((1, COLS), np.float32)
    out = np.empty((1, ROWS), np.float32)

    # Matrix by matrix, so that a moment of a busy neighbour spoils one short piece and not a whole pass.
    reads = [partial(kernels.read, weight.data) for weight in weights]
    runs = [partial(kernels.linear, weight, x, out=out) for weight in weights]
    times = best_s(*reads, *runs)
    reading_s, running_s = sum(times[: len(reads)]), sum(times[len(reads) :])
    n_bytes = sum(weight.data.nbytes for weight in weights)
    speed, limit = n_bytes / running_s / 1e9, n_bytes / reading_s / 1e9
    token_bytes = MODEL_WEIGHTS * BLOCKS[type].n_bytes / BLOCKS[type].n_weights
    print(
        f"  decode  {type.name:7}{speed:6.1f} GB/s, {speed / limit:4.0%} of reading ({limit:.1f} GB/s), "
        f"1B shape about {speed * 1e9 / token_bytes:.1f} tokens/s"
    )


def prefill(kernels: Kernels, type: GGUFType, memory: NDArray[np.uint8]) -> None:
    weight = matrices(type, memory)[0]
    rates = []
    for n in (2, 4, 8, 64, 256):
        x = np.random.default_rng(2).standard_normal((n, COLS), np.float32)
        (seconds,) = best_s(partial(kernels.linear, weight, x))
        rates.append(f"{n}: {n * ROWS * COLS / seconds / 1e9:.0f}")
    print(f"  prefill {type.name:7} 10^9 products/s for n rows  " + "  ".join(rates))


def attention(kernels: Kernels, n_positions: int) -> None:
    n_heads, n_kv_heads, head_dim = 32, 8, 128
    rng = np.random.default_rng(3)
    q = rng.standard_normal((1, n_heads, head_dim), np.float32)
    k = rng.standard_normal((n_positions, n_kv_heads, head_dim), np.float32)
    calls = []
    for type in KvType:
        cache = NumpyKv([Layers(0, 1)], n_kv_heads, head_dim, type)
        opening = KvOp(KvKind.OPEN, 0, capacity=n_positions)
        room = cache.begin(Layers(0, 1), Step((), (opening,))).rooms[0][0]
        kernels.kv_write(k, room.k, 0)
        kernels.kv_write(k, room.v, 0)
        calls.append(partial(kernels.attention, q, room.k, room.v, n_positions - 1, AttentionRule(head_dim**-0.5)))
    spent = zip(KvType, best_s(*calls), strict=True)
    print(f"  attention to {n_positions} positions  " + "  ".join(f"{type}: {s * 1e3:.2f} ms" for type, s in spent))


def matrices(type: GGUFType, memory: NDArray[np.uint8]) -> list[Weight]:
    """As many as fit into `memory`."""
    n_bytes = ROWS * COLS // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    if type is GGUFType.MXFP4:  # any byte is an exponent: none that makes sums leave the normal numbers
        memory[: len(memory) // 17 * 17].reshape(-1, 17)[:, 0] = 120
    parts = [memory[start : start + n_bytes] for start in range(0, len(memory) - n_bytes + 1, n_bytes)]
    return [Weight("w", type, (ROWS, COLS), part) for part in parts]


def best_s(*actions: Callable[[], object], repeats: int = 5) -> tuple[float, ...]:
    """Shortest time of each, taken in turns so that a busy neighbour meets all of them."""
    best = [float("inf")] * len(actions)
    for _ in range(repeats):
        for i, action in enumerate(actions):
            start = time.perf_counter()
            action()
            best[i] = min(best[i], time.perf_counter() - start)
    return tuple(best)


if __name__ == "__main__":
    main()
