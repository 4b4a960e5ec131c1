"""Mixtures of experts larger than memory: tokens/s, bytes read per token and hit rate, by how much may be in memory.

    python -m bench.experts [--folder DIR] [--shares 100,60,30] [--tokens 64] [--prompt 512] [-t 2]

The model has the proportions of Qwen3-30B-A3B at half its layers and experts (4.4 GB), random weights and made-up
tokens: its router chooses about evenly. Then some experts are made likelier than others, by the router's own weights.
What is not in memory is read past the page cache, so that no limit need be put on this process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cpu_models import cache_folder
from prima_core.arch.families import open_model
from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Shard, Slice, Step
from prima_core.memory.store import StreamingStore
from prima_core.memory.system import host
from prima_core.model.gguf import GGUFFile
from prima_core.model.weights import Model, end_tensors, populate
from prima_core.testing.tinymodel import TinyModel, big_shape
from prima_numpy.backend import DEVICE, NumpyBackend

SHAPE = TinyModel(
    arch="qwen3moe", n_layers=24, d_model=2048, n_heads=32, n_kv_heads=4, head_dim=128, d_ff=768, vocab_size=32768,
    context_length=4096, types="Q4_K_M", rope_theta=1e6, n_experts=64, n_experts_used=8,
)  # fmt: skip
SKEW = 0.5
"""The router's rows of the r-th expert are multiplied by r ** -SKEW: those of the first stand out more often."""
WARM_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Figures:
    share: float
    prefill_s: float
    token_s: float
    token_bytes: float
    hit_rate: float

    def __str__(self) -> str:
        return (
            f"{self.share:5.0%} {1 / self.token_s:10.2f} {self.token_bytes / 1e6:10.1f} {self.hit_rate:9.1%} "
            f"{self.prefill_s:10.2f}"
        )


def measure(model: Model, share: float, n_prompt: int, n_tokens: int, threads: int) -> Figures:
    """With so large a share of the weights in memory, the buffer included."""
    spec = model.spec
    layers = Layers(0, spec.n_layers)
    part = Slice((layers,), has_input=True, has_output=True)
    with _store(model, part, share) as store:
        shard = NumpyBackend(BackendOptions(threads)).load(spec, DEVICE, part, store)
        steps = _steps(spec.vocab_size, n_prompt, WARM_TOKENS + n_tokens)
        prefill_s = _timed(lambda: _run(shard, layers, next(steps)))
        for _ in range(WARM_TOKENS):
            _run(shard, layers, next(steps))
        before = store.stats()
        decode_s = _timed(lambda: [_run(shard, layers, step) for step in steps])
        after = store.stats()
    hits, misses = after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses
    read_bytes = (after.read_bytes - before.read_bytes) / n_tokens
    return Figures(share, prefill_s, decode_s / n_tokens, read_bytes, hits / (hits + misses) if misses else 1.0)


@contextmanager
def _store(model: Model, part: Slice, share: float) -> Iterator[StreamingStore]:
    ends = end_tensors(model.spec, part)
    total = model.store_bytes()
    streamed = round((1 - share) * total)
    buffer_bytes = _least_buffer(model)
    streamed_bytes = streamed + buffer_bytes if streamed else 0
    store = StreamingStore(model.file, model.spec, part.layers, ends, streamed_bytes, buffer_bytes, host())
    try:
        kept = (w for layer in part.layers[0] for w in store.views(layer).values() if not store.is_streamed(w.name))
        populate(kept, lambda n_bytes: None)
        populate(store.pinned_ends(), lambda n_bytes: None)
        store.start()
        yield store
    finally:
        store.close()


def _steps(vocab_size: int, n_prompt: int, n_tokens: int) -> Iterator[Step]:
    ids = np.random.default_rng(1).integers(0, vocab_size, n_prompt + n_tokens).tolist()
    opening = KvOp(KvKind.OPEN, 0, capacity=len(ids))
    yield Step((Chunk(0, 0, n_prompt),), (opening,), tuple(ids[:n_prompt]))
    for position in range(n_prompt, len(ids)):
        yield Step((Chunk(0, position, 1),), (), (ids[position],))


def _run(shard: Shard, layers: Layers, step: Step) -> None:
    x = shard.run(layers, shard.embed(step), step)
    shard.logits(x, [len(x) - 1])


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def skew(path: Path, exponent: float) -> None:
    """Make some experts of each layer likelier than others, in the file."""
    with GGUFFile.open(path) as file, path.open("rb+") as written:
        routers = [info for name, info in file.tensors.items() if name.endswith("ffn_gate_inp.weight")]
        for info in routers:
            ranks = 1 + np.random.default_rng(info.offset).permutation(info.shape[0])
            rows = file.view(info.name).data.view(np.float32).reshape(info.shape) * ranks[:, None] ** -exponent
            written.seek(info.offset)
            written.write(rows.astype(np.float32).tobytes())
