"""How fast the native products are, beside how fast the same threads read memory in the same run.

    python bench/kernels.py [--threads 1 2] [--variant auto ...] [--mib 512] [--types Q4_K Q5_K] [--json FILE]

Decode rows: 1, 2, 4 and 8 activation rows by matrices that do not fit in the caches, from a mapped file, warm. The
share of plain reading is what counts: absolute figures change with the neighbours on a machine.
Prefill rows: many activation rows by one matrix, beside what the same instructions reach in registers alone.
Attention rows: a layer shaped as Llama-3-8B's (32 heads that share 8), by type of K and V.
"""

from __future__ import annotations

import argparse
import json
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import KvKind, KvOp, KvType, Layers, Step, Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.kernels import Kernels, KvSpan
from prima_numpy.kv import NumpyKv

ROWS, COLS = 2048, 8192
LARGEST_MIB = ROWS * COLS * 4 >> 20
DECODED = (1, 2, 4, 8)
"""Activation rows of a decode step."""
MODEL_WEIGHTS = 1.236e9
"""Weights that a token of a Llama-3.2-1B reads, the tied output matrix included."""
REGISTER_PRODUCTS = 10**10
N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = AttentionRule(HEAD_DIM**-0.5)


@dataclass(frozen=True, slots=True)
class Decode:
    variant: str
    threads: int
    type: str
    rows: int
    gb_s: float
    reading_gb_s: float
    share: float
    """gb_s / reading_gb_s"""
    tokens_s: float
    """Of each of the rows, by a model of 1B shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    variants = ("auto", *Kernels.variants())
    parser.add_argument("--variant", nargs="+", choices=variants, default=["auto"], help="forced one after the other")
    parser.add_argument("--mib", type=int, default=512, help="memory that a decode pass walks through")
    names = [type.name for type in GGUFType]
    parser.add_argument("--types", nargs="+", choices=names, default=names, metavar="TYPE")
    parser.add_argument("--only", choices=("decode", "prefill", "attention"))
    parser.add_argument("--json", type=Path, help="decode figures into this file")
    options = parser.parse_args()
    if min(options.threads) < 1 or options.mib < LARGEST_MIB:
        parser.error(f"--threads are from 1 on, --mib from {LARGEST_MIB}, which one matrix of F32 takes")
    wants = {options.only} if options.only else {"decode", "prefill", "attention"}
    engines = [Kernels(threads, variant) for variant in options.variant for threads in options.threads]
    types = [GGUFType[name] for name in options.types]
    figures: list[Decode] = []
    with mapped_file(options.mib << 20) as memory:
        if "decode" in wants:
            head = "".join(f"{f'{n} row' + 's' * (n > 1):>16}" for n in DECODED)
            print(f"decode, matrices {ROWS} x {COLS}: share of reading, GB/s\n{'':32}{'reading':>8}{head}  1B shape")
            for type in types:
                weights = matrices(type, memory)
                for kernels in engines:
                    rates = decode(kernels, weights)
                    print_decode(rates)
                    figures += rates
        for kernels in engines if wants - {"decode"} else ():
            print(f"\n{kernels.variant}, {kernels.threads} thread(s), matrices {ROWS} x {COLS}")
            kernels.multiply(REGISTER_PRODUCTS)  # warms up
            for type in types if "prefill" in wants else ():
                prefill(kernels, type, memory)
            for kv_type in KvType if "attention" in wants else ():
                attention(kernels, kv_type, options.mib)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")


def decode(kernels: Kernels, weights: list[Weight]) -> list[Decode]:
    # Matrix by matrix, so that a moment of a busy neighbour spoils one short piece and not a whole pass.
    type, count = weights[0].type, len(weights)
    actions: list[Callable[[], object]] = [partial(kernels.read, weight.data) for weight in weights]
    for n in DECODED:
        x, out = np.random.default_rng(1).standard_normal((n, COLS), np.float32), np.empty((n, ROWS), np.float32)
        actions += [partial(kernels.linear, weight, x, out=out) for weight in weights]
    times = best_s(*actions)
    n_bytes = sum(weight.data.nbytes for weight in weights)
    limit, *speeds = (n_bytes / sum(times[i : i + count]) / 1e9 for i in range(0, len(times), count))
    token_bytes = MODEL_WEIGHTS * BLOCKS[type].n_bytes / BLOCKS[type].n_weights
    return [
        Decode(kernels.variant, kernels.threads, type.name, n, speed, limit, speed / limit, speed * 1e9 / token_bytes)
        for n, speed in zip(DECODED, speeds, strict=True)
    ]


def print_decode(rates: list[Decode]) -> None:
    first = rates[0]
    shares = "".join(f"{rate.share:9.0%}{rate.gb_s:7.1f}" for rate in rates)
    who = f"  {first.type:8}{first.variant:13}{first.threads} thread{'s' * (first.threads > 1):1}"
    print(f"{who:32}{first.reading_gb_s:8.1f}{shares}  {first.tokens_s:.1f} tokens/s")


def prefill(kernels: Kernels, type: GGUFType, memory: NDArray[np.uint8]) -> None:
    weight = matrices(type, memory[: 4 * ROWS * COLS])[0]
    rates = []
    for n in (2, 4, 8, 64, 128, 512):
        x = np.random.default_rng(2).standard_normal((n, COLS), np.float32)
        seconds, register_s = best_s(partial(kernels.linear, weight, x), partial(kernels.multiply, REGISTER_PRODUCTS))
        rate, limit = n * ROWS * COLS / seconds, REGISTER_PRODUCTS / register_s
        rates.append(f"{n}: {rate / 1e9:.0f}")
    ceiling = f"  {rate / limit:.0%} of {limit / 1e9:.0f} in registers" if kernels.multiply(0) else ""
    print(f"  prefill {type.name:7} 10^9 products/s for n rows  " + "  ".join(rates) + ceiling)


def attention(kernels: Kernels, type: KvType, mib: int) -> None:
    """Decode: one token to so many positions, layer by layer through `mib` of K and V, beside reading them."""
    for n_positions in (512, 8192, 32768):
        q, layers = attended(kernels, type, n_positions, 1, mib)
        reads = [partial(kernels.read, half.view(np.uint8).reshape(-1)) for layer in layers for half in layer[:2]]
        runs = [partial(kernels.attention, q, [layer], SCALE) for layer in layers]
        times = best_s(*reads, *runs)
        reading_s, running_s = sum(times[: len(reads)]), sum(times[len(reads) :])
        n_bytes = sum(k.nbytes + v.nbytes for k, v, _, _ in layers)
        speed, limit = n_bytes / running_s / 1e9, n_bytes / reading_s / 1e9
        print(
            f"  attention {type:5} one token to {n_positions:5}: {running_s / len(layers) * 1e3:6.2f} ms, "
            f"{speed:5.1f} GB/s, {speed / limit:4.0%} of reading ({limit:.1f} GB/s)"
        )
    for n_positions in (512, 8192):
        q, [layer] = attended(kernels, type, n_positions, 512, 1)
        (seconds,) = best_s(partial(kernels.attention, q, [layer], SCALE), repeats=3)
        print(f"  attention {type:5} 512 tokens from {n_positions - 512:5}: {seconds * 1e3:6.1f} ms")


def attended(
    kernels: Kernels, type: KvType, n_positions: int, n: int, mib: int
) -> tuple[NDArray[np.float32], list[KvSpan]]:
    """Queries of the last n of so many positions, and layers of K and V that fill `mib` or are one."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((n, N_HEADS, HEAD_DIM), np.float32)
    k = rng.standard_normal((n_positions, N_KV_HEADS, HEAD_DIM), np.float32)
    layers: list[KvSpan] = []
    while not layers or sum(k.nbytes + v.nbytes for k, v, _, _ in layers) < mib << 20:
        cache = NumpyKv([Layers(0, 1)], N_KV_HEADS, HEAD_DIM, type)
        opening = KvOp(KvKind.OPEN, 0, capacity=n_positions)
        room = cache.begin(Layers(0, 1), Step((), (opening,))).rooms[0][0]
        kernels.kv_write(k, k, [(room.k, room.v, 0, n_positions)])
        layers.append((room.k, room.v, n_positions - n, n))
    return q, layers


@contextmanager
def mapped_file(n_bytes: int) -> Iterator[NDArray[np.uint8]]:
    with tempfile.TemporaryFile() as file:
        file.truncate(n_bytes)
        yield np.frombuffer(mmap.mmap(file.fileno(), n_bytes), np.uint8)


def matrices(type: GGUFType, memory: NDArray[np.uint8]) -> list[Weight]:
    """As many as fit into `memory`, which is filled with weights of that type."""
    n_bytes = ROWS * COLS // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    some = sane_weights(type, min(len(memory), 17 << 20))
    for start in range(0, len(memory), len(some)):
        memory[start : start + len(some)] = some[: len(memory) - start]
    parts = [memory[start : start + n_bytes] for start in range(0, len(memory) - n_bytes + 1, n_bytes)]
    return [Weight("w", type, (ROWS, COLS), part) for part in parts]


def sane_weights(type: GGUFType, n_bytes: int) -> NDArray[np.uint8]:
    """Such that no product leaves the normal numbers, which would be slow."""
    rng = np.random.default_rng(0)
    if type in (GGUFType.F32, GGUFType.BF16):
        values = rng.standard_normal(n_bytes // 2, np.float32)
        return (values[: n_bytes // 4] if type is GGUFType.F32 else values.view(np.uint16)[1::2].copy()).view(np.uint8)
    data = rng.integers(0, 256, n_bytes, np.uint8)
    data &= 0xBF  # every half that a block may hold is finite
    if type is GGUFType.MXFP4:  # any byte is an exponent
        data[: len(data) // 17 * 17].reshape(-1, 17)[:, 0] = 120
    return data


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
