"""bench/gpu.py: how much of what the GPU can do kernels and a whole model get."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch

from bench.gpu_linear import planes
from bench.gpu_machine import BF16, READ
from bench.gpu_parts import Row, Settings
from bench.gpu_weights import LLAMA_8B, LLAMA_TINY, Q4_K_M, SMALL_BLOCKS, mixed, random_weight
from bench.memory_store import MemoryStore, whole
from prima_core.arch.llama import llama_shapes
from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Shard, Step
from prima_core.model.quant import GGUFType
from prima_core.model.spec import ModelSpec
from prima_torch.cuda_ops import CudaOps
from prima_torch.graphs import CudaGraphs, Reruns
from prima_torch.kernels.linear import matvec
from prima_torch.planes import Planes, empty
from prima_torch.shard import TorchShard

CACHES_BYTES = 512 << 20
"""More than the caches of any GPU: what a timed run walks through."""

# ---------------------------------------------------------------- kernels


def compiled(types: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Triton keeps what it has compiled on disk: with the products of all shapes made once, what is measured later need
    not wait for it."""
    for name in types:
        start, type = time.perf_counter(), GGUFType[name]
        shapes = {_kernel_shape(settings)}
        if type in Q4_K_M:
            shapes |= {(LLAMA_8B.vocab_size, LLAMA_8B.d_model)}
            shapes |= {(shape[0], shape[1]) for shape in llama_shapes(LLAMA_8B).values() if len(shape) == 2}
        try:
            for rows, columns in shapes:
                matrix = empty(type, rows, columns, settings.device)
                for n in (1, 8):
                    matvec(torch.zeros((n, columns), device=settings.device), matrix)
            settings.wait()
        except Exception as problem:  # noqa: BLE001  # the other types are tried too
            yield {"type": name, "right": False, "problem": f"{problem}"}
        else:
            yield {"type": name, "shapes": len(shapes), "s": time.perf_counter() - start}


def kernels(settings: Settings) -> Iterator[Row]:
    """Matrices that are not in a cache, one after the other, launched as a CUDA graph: then the host plays no part."""
    types = [GGUFType.F16] if settings.tiny else list(GGUFType)
    for type in types:
        row: Row = {"type": type.name}
        for n in (1, 8):
            try:
                speed = _matvec_bytes_per_s(type, n, settings) / 1e9
            except Exception as problem:  # noqa: BLE001  # the other types are tried too
                yield {"type": type.name, "right": False, "problem": f"n={n}: {problem}"}
                break
            row |= {f"n={n} GB/s": speed, f"n={n} share": settings.share(speed, READ)}
        else:
            yield row


def _kernel_shape(settings: Settings) -> tuple[int, int]:
    return (8, 32) if settings.tiny else (4096, 14336)


def _matvec_bytes_per_s(type: GGUFType, n: int, settings: Settings) -> float:
    shape = _kernel_shape(settings)
    matrix = planes(random_weight(type, shape), settings.device)
    n_copies = 2 if settings.tiny else -(-CACHES_BYTES // matrix.n_bytes)
    copies = [
        Planes(type, *shape, {name: field.clone() for name, field in matrix.fields.items()}) for _ in range(n_copies)
    ]
    x = torch.randn((n, shape[1]), device=settings.device)

    def run() -> torch.Tensor:
        return [matvec(x, copy) for copy in copies][-1]

    recorder = Reruns() if settings.tiny else CudaGraphs(settings.device)
    replay = recorder.record(run).replay
    replay()

    def several() -> None:
        for _ in range(1 if settings.tiny else 8):
            replay()

    return n_copies * matrix.n_bytes * (1 if settings.tiny else 8) / settings.best_s(several)


# ---------------------------------------------------------------- a model


def model(settings: Settings) -> Iterator[Row]:
    spec, types, n_positions = (LLAMA_TINY, SMALL_BLOCKS, 1) if settings.tiny else (LLAMA_8B, Q4_K_M, 512)
    store = mixed(spec, types)
    start = time.perf_counter()
    shard = _loaded(spec, store, settings, n_sequences=9, n_positions=n_positions + 200)
    settings.wait()
    yield {"what": f"loading {store.bytes_of_a_token() / 1e9:.2f} GB", "s": time.perf_counter() - start}
    decoder = _Decoder(shard, spec, n_positions + 200)
    yield _prefill(decoder, store, settings, n_positions)
    for batch in (1,) if settings.tiny else (1, 8):
        sequences = range(batch)
        for sequence in sequences:
            decoder.prefill(sequence, n_positions)
        yield _decode(decoder, store, settings, batch)
        if settings.profile:
            yield from _profile(partial(decoder.decode, batch), f"decode, batch {batch}", settings)
    if settings.profile:
        yield from _profile(partial(decoder.prefill, 8, n_positions), f"prefill of {n_positions}", settings)
    shard.close()


def _loaded(
    spec: ModelSpec, store: MemoryStore, settings: Settings, n_sequences: int, n_positions: int
) -> Shard:  # fmt: skip
    part = whole(spec, n_sequences * n_positions)
    if settings.tiny:
        return TorchShard(CudaOps(settings.device), spec, part, store, Reruns())
    from prima_torch.backend import TorchBackend

    return TorchBackend(BackendOptions()).load(spec, "torch:cuda:0", part, store)


class _Decoder:
    """Sequences of made-up tokens: time does not depend on which they are."""

    def __init__(self, shard: Shard, spec: ModelSpec, capacity: int) -> None:
        self._shard, self._spec, self._capacity = shard, spec, capacity
        self._lengths: dict[int, int] = {}
        self.times: list[tuple[float, ...]] = []  # of the last steps: embedding, layers, output; s

    def prefill(self, sequence: int, n: int) -> None:
        """In one step, whatever the sequence held; with the logits of the last token."""
        kv = (KvOp(KvKind.DROP, sequence), KvOp(KvKind.OPEN, sequence, capacity=self._capacity))
        tokens = tuple(7 * i % self._spec.vocab_size for i in range(n))
        self._lengths[sequence] = n
        self._pass(Step((Chunk(sequence, 0, n),), kv, tokens), [n - 1])

    def decode(self, batch: int) -> None:
        """One step for the first sequences."""
        chunks = tuple(Chunk(sequence, self._lengths[sequence], 1) for sequence in range(batch))
        for sequence in range(batch):
            self._lengths[sequence] += 1
        tokens = tuple(11 * chunk.start % self._spec.vocab_size for chunk in chunks)
        self._pass(Step(chunks, (), tokens), list(range(batch)))

    def _pass(self, step: Step, rows: list[int]) -> None:
        marks = [time.perf_counter()]
        x = self._shard.embed(step)
        marks.append(time.perf_counter())
        x = self._shard.run(Layers(0, self._spec.n_layers), x, step)
        marks.append(time.perf_counter())
        logits = self._shard.logits(x, rows)
        np.argmax(logits, axis=1)
        marks.append(time.perf_counter())
        if not np.isfinite(logits).all():
            raise ValueError("logits are no numbers")
        self.times.append(tuple(np.diff(marks)))


def _decode(decoder: _Decoder, store: MemoryStore, settings: Settings, batch: int) -> Row:
    """Whole steps as a head sees them, from token ids to the most likely next ones."""
    n_steps = 1 if settings.tiny else 64
    for _ in range(1 if settings.tiny else 4):  # records, and warms up
        decoder.decode(batch)
    decoder.times.clear()
    for _ in range(n_steps):
        decoder.decode(batch)
    step_s = median(map(sum, decoder.times))
    embedding, layers, output = (median(column) * 1e3 for column in zip(*decoder.times, strict=True))
    return {
        "what": f"decode, batch {batch}", "tokens/s": batch / step_s,
        "share": settings.share(store.bytes_of_a_token() / step_s / 1e9, READ), "goal": ">= 35%, better 60%",
        "ms a step": step_s * 1e3, "embedding": embedding, "layers": layers, "output": output,
    }  # fmt: skip


def _prefill(decoder: _Decoder, store: MemoryStore, settings: Settings, n: int) -> Row:
    """Its work: 2 operations for each weight of the layers' matrices and token; attention and output not counted."""
    for _ in range(2 if settings.tiny else 7):
        decoder.prefill(0, n)
    times = decoder.times[1:]
    step_s = median(map(sum, times))
    embedding, layers, output = (median(column) * 1e3 for column in zip(*times, strict=True))
    return {
        "what": f"prefill of {n}", "tokens/s": n / step_s,
        "share": settings.share(2 * store.weights_of_layers() * n / step_s / 1e12, BF16), "goal": ">= 25%, better 50%",
        "ms a step": step_s * 1e3, "embedding": embedding, "layers": layers, "output": output,
    }  # fmt: skip


def _profile(action: Callable[[], None], what: str, settings: Settings) -> Iterator[Row]:
    """What the device is busy with in one step, by kernel; of the CPU's operations where that is the device."""
    from torch.profiler import ProfilerActivity, profile

    n_steps = 1 if settings.tiny else 4
    activity = ProfilerActivity.CPU if settings.tiny else ProfilerActivity.CUDA
    action()
    with profile(activities=[activity]) as profiler:
        for _ in range(n_steps):
            action()
        settings.wait()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        micros = event.self_cpu_time_total if settings.tiny else event.self_device_time_total
        spent[event.key] = micros / n_steps, event.count
    total = sum(micros for micros, _ in spent.values())
    yield {"profile": what, "kernel": "all", "launches": sum(n for _, n in spent.values()) // n_steps,
           "us a step": total, "share": 1.0}  # fmt: skip
    for name, (micros, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:16]:
        yield {"profile": what, "kernel": name[:60], "launches": count // n_steps, "us a step": micros,
               "share": micros / total}  # fmt: skip
