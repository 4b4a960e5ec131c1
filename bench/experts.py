"""A mixture of experts larger than memory: tokens/s, bytes read per token and hit rate, by how much may be in memory.

    python -m bench.experts [--folder DIR] [--shares 1,0.6,0.3] [--prompt 128] [--gen 32] [-t 2] [--llama-bench PATH]

The model has the shape of Qwen3-30B-A3B with half of its layers and experts (Q4_K_M, 4.8 GB), random weights and
made-up tokens: no expert stands out. In the second file some do: the longer an expert's row of the router, the more
often it is chosen. What is not in memory is read past the page cache, so that no limit need be put on this process;
with memory for all of it nothing is read. With --llama-bench llama.cpp, by mmap, does the same in a cage of `prima
bench --cluster` with as much memory for the weights, and 225 MB for itself; that wants root.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cpu_models import cache_folder
from bench.larger import llama
from prima_core.arch.families import open_model
from prima_core.cage.bench import bench_cluster
from prima_core.cage.limits import Workload
from prima_core.config import SETTINGS
from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Shard, Slice, Step
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import host
from prima_core.model.gguf import GGUFFile
from prima_core.model.weights import Model, end_tensors
from prima_core.testing.tinymodel import TinyModel, big_shape
from prima_numpy.backend import DEVICE, NumpyBackend

SHAPE = TinyModel(
    arch="qwen3moe", n_layers=24, d_model=2048, n_heads=32, n_kv_heads=4, head_dim=128, d_ff=768, vocab_size=32768,
    context_length=4096, types="Q4_K_M", rope_theta=1e6, n_experts=64, n_experts_used=8,
)  # fmt: skip
SKEW = 0.5
"""Row r of a skewed router, in an order of its layer's own, is divided by (r + 1) ** SKEW."""
BUFFER_BYTES = 64 * 1024 * 1024
WARM_TOKENS = 16
N_PEER = 2
"""Tokens of llama.cpp where not all is in memory: half a minute each, as pages come one by one."""


@dataclass(frozen=True, slots=True)
class Figures:
    """`hit_rate`: the share of a token's experts that were in memory."""

    share: float
    prefill_s: float
    token_s: float
    token_bytes: float
    hit_rate: float

    def __str__(self) -> str:
        return (
            f"{self.share:6.0%} {1 / self.token_s:9.2f} {self.token_bytes / 1e6:9.0f} {self.hit_rate:9.1%} "
            f"{self.prefill_s:10.2f}"
        )


HEADER = "memory  tokens/s  MB/token  hit rate  prefill s"


def measure(model: Model, share: float, n_prompt: int, n_tokens: int, threads: int) -> Figures:
    """With so large a share of the weights in memory."""
    layers = Layers(0, model.spec.n_layers)
    part = Slice((layers,), has_input=True, has_output=True)
    with loaded(model, part, share) as store:
        shard = NumpyBackend(BackendOptions(threads)).load(model.spec, DEVICE, part, store)
        steps = steps_of(model.spec.vocab_size, n_prompt, WARM_TOKENS + n_tokens)
        prefill_s = seconds(lambda: run(shard, layers, next(steps)))
        for _ in range(WARM_TOKENS):
            run(shard, layers, next(steps))
        before = store.stats()
        decode_s = seconds(lambda: run(shard, layers, *steps))
        after = store.stats()
    hits, misses = after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses
    token_bytes = (after.read_bytes - before.read_bytes) / n_tokens
    return Figures(share, prefill_s, decode_s / n_tokens, token_bytes, hits / (hits + misses) if misses else 1.0)


@contextmanager
def loaded(model: Model, part: Slice, share: float) -> Iterator[StreamingStore]:
    total = sum(info.n_bytes for info in model.file.tensors.values())
    streamed = 0 if share >= 1 else round((1 - share) * total) + BUFFER_BYTES
    ends = end_tensors(model.spec, part)
    store = StreamingStore(model.file, model.spec, part.layers, ends, streamed, BUFFER_BYTES, host())
    try:
        weights = [weight for layer in part.layers[0] for weight in store.views(layer).values()]
        for weight in [weight for weight in weights if not store.is_streamed(weight.name)] + store.pinned_ends():
            host().populate(weight.data)
        store.start()
        yield store
    finally:
        store.close()


def peer(program: str, path: Path, mine: Figures, n_prompt: int, n_tokens: int, threads: int) -> str:
    """What llama.cpp does with as much memory, after as many tokens: a line like that of `mine`. Raises PrimaError."""
    memory = f"{mine.share:.0%} of model"
    options = ("-d", str(n_prompt + WARM_TOKENS), *(("-t", str(threads)) if threads else ()))
    settings = {name: setting.default for name, setting in SETTINGS.items()}
    work = Workload(n_prompt, n_tokens if mine.share >= 1 else N_PEER)
    figures = bench_cluster(llama(program, memory, *options), path, work, settings, lambda line: None)
    return (
        f"{'':6} {1 / figures.tpot_s:9.2f} {figures.read_bytes_per_token / 1e6:9.0f}  llama.cpp;"
        f" prima is {figures.tpot_s / mine.token_s:.2f} times as fast"
    )


def steps_of(vocab_size: int, n_prompt: int, n_tokens: int) -> Iterator[Step]:
    """A prompt, then tokens one by one; all are made up."""
    ids = np.random.default_rng(1).integers(0, vocab_size, n_prompt + n_tokens).tolist()
    yield Step((Chunk(0, 0, n_prompt),), (KvOp(KvKind.OPEN, 0, capacity=len(ids)),), tuple(ids[:n_prompt]))
    for position in range(n_prompt, len(ids)):
        yield Step((Chunk(0, position, 1),), (), (ids[position],))


def run(shard: Shard, layers: Layers, *steps: Step) -> None:
    for step in steps:
        x = shard.run(layers, shard.embed(step), step)
        shard.logits(x, [len(x) - 1])


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def skew(path: Path) -> None:
    """Make some experts of each layer likelier than others, in the file."""
    with GGUFFile.open(path) as file, path.open("rb+") as written:
        for info in [info for name, info in file.tensors.items() if name.endswith("ffn_gate_inp.weight")]:
            ranks = np.random.default_rng(info.offset).permutation(info.shape[0]) + 1
            rows = file.view(info.name).data.view(np.float32).reshape(info.shape)
            written.seek(info.offset)
            written.write((rows / ranks[:, None] ** SKEW).astype(np.float32).tobytes())


def uncached(path: Path) -> None:
    """What was written lies on disk only."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with GGUFFile.open(path) as model:
        for info in model.tensors.values():
            host().drop(model.view(info.name).data, path, info.offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder())
    parser.add_argument("--shares", default="1,0.6,0.3", help="of the weights, in memory")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--llama-bench")
    args = parser.parse_args()
    path = args.folder / "experts-q4_k_m.gguf"
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        big_shape(path, SHAPE)
        for kind in ("even", "skewed"):
            if kind == "skewed":
                skew(path)
            uncached(path)
            print(f"choices: {kind}\n{HEADER}", flush=True)
            for share in map(float, args.shares.split(",")):
                with open_model(path) as model:
                    figures = measure(model, share, args.prompt, args.gen, args.threads)
                del model  # its pages have to get out of the page cache
                print(figures, flush=True)
                if args.llama_bench:
                    print(peer(args.llama_bench, path, figures, args.prompt, args.gen, args.threads), flush=True)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
