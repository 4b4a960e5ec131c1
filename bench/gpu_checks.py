"""bench/gpu.py: attention, the small operations and whole passes, against numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu_linear import EXACT, relative
from bench.gpu_parts import Row, Settings
from bench.gpu_weights import LLAMA_SMALL, LLAMA_TINY, Q4_K_M, SMALL_BLOCKS, mixed, random_weight
from bench.memory_store import whole
from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.arch.shard import OpsShard
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Shard, Step
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec
from prima_numpy.ops import ReferenceOps, exact_product
from prima_torch.cuda_ops import CudaOps
from prima_torch.graphs import CudaGraphs, Reruns
from prima_torch.kernels.attention import decode_attention
from prima_torch.kernels.kv_write import write_kv
from prima_torch.kv import PAGE
from prima_torch.shard import TorchShard

FloatArray = NDArray[np.float32]
PREFILL = 3e-2
"""Largest error of logits after a prefill in bf16, as a part of the largest logit."""

# ---------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True)
class Heads:
    n: int
    n_kv: int
    dim: int


def attention(settings: Settings) -> Iterator[Row]:
    shapes = [Heads(2, 1, 32)] if settings.tiny else [Heads(32, 8, 128), Heads(8, 8, 64), Heads(48, 2, 256)]
    lengths = [3, 66] if settings.tiny else [1, 63, 64, 65, 300, 1000, 2048]
    rules = {"all positions": (0.0, 0), "a window of 50": (0.0, 50), "softcap 30": (30.0, 0)}
    for kv_type, own in zip(KvType, rules, strict=True):
        for heads in shapes:
            for name, (softcap, window) in ((own, rules[own]),) if settings.tiny else rules.items():
                rule = AttentionRule(heads.dim**-0.5, softcap, window)
                error = _attention(kv_type, heads, lengths, rule, settings.device)
                shape = f"{heads.n}/{heads.n_kv} of {heads.dim}"
                yield {"kv": kv_type.value, "heads": shape, "sees": name, "error": error, "right": error <= EXACT}


def _attention(
    kv_type: KvType, heads: Heads, lengths: Sequence[int], rule: AttentionRule, device: torch.device
) -> float:
    """Rows of all lengths at once, and one of length 0, which fills up a batch."""
    rng = np.random.default_rng(3)
    n_pages = [-(-length // PAGE) for length in lengths]
    table = np.zeros((len(lengths) + 1, max(n_pages)), np.int32)
    shuffled = rng.permutation(sum(n_pages)).astype(np.int32)
    for row, first, n in zip(table, np.cumsum([0, *n_pages]), n_pages, strict=False):
        row[:n] = shuffled[first : first + n]
    halves = [_stored(kv_type, heads, table, lengths, rng, device) for _ in "kv"]
    q = rng.standard_normal((len(table), heads.n * heads.dim), np.float32)
    (k, k_scales, keys), (v, v_scales, values) = halves
    found = decode_attention(
        _there(q, device), k, v, _there(table, device), _there(np.array([*lengths, 0], np.int32), device), rule,
        heads.n_kv, 1 << (max(lengths) - 1).bit_length(), k_scales, v_scales,
    ).cpu().numpy()  # fmt: skip
    seen = zip(q, keys, values, strict=False)
    right = np.stack([_attend(row, own_keys, own_values, heads, rule) for row, own_keys, own_values in seen])
    return max(relative(found[:-1], right), float(np.abs(found[-1]).max()))


Half = tuple[torch.Tensor, torch.Tensor | None, list[NDArray[np.float64]]]


def _stored(
    kv_type: KvType, heads: Heads, table: NDArray[np.int32], lengths: Sequence[int], rng: np.random.Generator,
    device: torch.device,
) -> Half:  # fmt: skip
    """Pages that random rows were written to, their scales, and what stands there of each sequence. Pages that nobody
    wrote to hold NaN."""
    shape = int(table.max()) + 1, PAGE, heads.n_kv, heads.dim
    is_q8_0 = kv_type is KvType.Q8_0
    dtype = {KvType.F32: torch.float32, KvType.F16: torch.float16, KvType.Q8_0: torch.int8}[kv_type]
    pages = torch.full(shape, 77 if is_q8_0 else torch.nan, dtype=dtype, device=device)
    of_runs = (*shape[:3], heads.dim // 32)
    scales = torch.full(of_runs, torch.nan, dtype=torch.float16, device=device) if is_q8_0 else None
    rows = [rng.standard_normal((length, heads.n_kv * heads.dim), np.float32) for length in lengths]
    at = [np.arange(length) for length in lengths]
    slots = [own[p // PAGE].astype(np.int64) * PAGE + p % PAGE for own, p in zip(table, at, strict=False)]
    write_kv(_there(np.concatenate(rows), device), pages, scales, _there(np.concatenate(slots), device))
    values = pages.float()
    if scales is not None:
        values = (values.view(*of_runs, 32) * scales.float()[..., None]).view(shape)
    flat = values.flatten(0, 1).cpu().numpy().astype(np.float64)
    step = {KvType.F32: 0.0, KvType.F16: 2**-11, KvType.Q8_0: 0.51 / 127}[kv_type]  # of rounding, by the largest value
    for own, row in zip(slots, rows, strict=True):
        if not np.allclose(flat[own].reshape(row.shape), row, atol=step * float(np.abs(row).max()), rtol=1e-3):
            raise ValueError(f"rows written in {kv_type} do not stand in the pages")
    return pages, scales, [flat[own] for own in slots]


def _there(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _attend(
    q: FloatArray, keys: NDArray[np.float64], values: NDArray[np.float64], heads: Heads, rule: AttentionRule
) -> NDArray[np.float64]:
    first = max(0, len(keys) - rule.window) if rule.window else 0
    group = q.astype(np.float64).reshape(heads.n_kv, -1, heads.dim)
    scores = np.einsum("hgd,phd->hgp", group, keys[first:]) * rule.scale
    if rule.softcap:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    mixed: NDArray[np.float64] = np.einsum("hgp,phd->hgd", weights / weights.sum(axis=2, keepdims=True), values[first:])
    return mixed.reshape(-1)


# ---------------------------------------------------------------- small operations


def ops(settings: Settings) -> Iterator[Row]:
    """Against numpy in float32."""
    there, here = CudaOps(settings.device), ReferenceOps(exact_product)
    rng = np.random.default_rng(4)
    width, head_dim = (64, 32) if settings.tiny else (4096, 128)
    n = 1 if settings.tiny else 5
    x, y = rng.standard_normal((2, n, width), np.float32)
    gains = {"rms_norm": rng.random(width, np.float32), "rms_norm of heads": rng.random(head_dim, np.float32)}
    for name, gain in gains.items():
        found = there.rms_norm(there.from_host(x), there.from_host(gain), 1e-5)
        yield _op(name, there.to_host(found), here.rms_norm(x, gain, 1e-5))
    angles = rng.uniform(0, 1000, (n, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    for kind in RopeKind:
        turned = there.rope(there.from_host(x), Rope(kind, head_dim, there.from_host(cos), there.from_host(sin)))
        yield _op(f"rope {kind}", there.to_host(turned), here.rope(x.copy(), Rope(kind, head_dim, cos, sin)))
    for name in ("swiglu", "geglu", "add"):
        found = getattr(there, name)(there.from_host(x), there.from_host(y))
        yield _op(name, there.to_host(found), getattr(here, name)(x, y))
    yield _op("mixture", *_mixtures(there, here, rng, settings.tiny))


def _mixtures(
    there: CudaOps, here: ReferenceOps, rng: np.random.Generator, tiny: bool
) -> tuple[FloatArray, FloatArray]:
    type, n, (n_experts, d, d_ff) = (GGUFType.F32, 1, (2, 8, 8)) if tiny else (GGUFType.Q4_K, 5, (8, 1024, 512))
    x = rng.standard_normal((n, d), np.float32)
    scores = rng.standard_normal((n, n_experts), np.float32)
    shapes = [(n_experts, d_ff, d), (n_experts, d_ff, d), (n_experts, d, d_ff)]
    stacks = [random_weight(type, shape, f"stack {i}") for i, shape in enumerate(shapes)]
    held, rule = [there.matrix(stack) for stack in stacks], RoutingRule(2)
    found = there.mixture(there.from_host(x), there.from_host(scores), held[0], held[1], held[2], rule)
    gate, up, down = stacks
    return there.to_host(found), here.mixture(x, scores, here.matrix(gate), here.matrix(up), here.matrix(down), rule)


def _op(name: str, found: FloatArray, right: FloatArray) -> Row:
    error = relative(found, right.astype(np.float64))
    return {"operation": name, "error": error, "right": error <= EXACT}


# ---------------------------------------------------------------- recorded passes


def graphs(settings: Settings) -> Iterator[Row]:
    """The same steps through a shard that replays, one that does not, and numpy's."""
    model = LLAMA_TINY if settings.tiny else LLAMA_SMALL
    store = mixed(model, SMALL_BLOCKS if settings.tiny else Q4_K_M)
    steps = list(_steps(1, model.vocab_size))[:3] if settings.tiny else list(_steps(254, model.vocab_size))
    for kv_type in (KvType.F32,) if settings.tiny else KvType:
        part, ops = replace(whole(model), kv_type=kv_type), CudaOps(settings.device)
        shards: list[Shard] = [
            TorchShard(ops, model, part, store, Reruns() if settings.tiny else CudaGraphs(settings.device)),
            TorchShard(ops, model, part, store),
            OpsShard(ReferenceOps(exact_product, KvType.F32), model, part, store),
        ]
        recorded, eager, right = zip(*(_logits(shards, model, step) for step in steps), strict=True)
        differs = max(float(np.abs(a - b).max()) for a, b in zip(recorded, eager, strict=True))
        error = max(relative(a, b.astype(np.float64)) for a, b in zip(recorded, right, strict=True))
        yield {
            "kv": kv_type.value, "steps": len(steps), "replayed less eager": differs,
            "error to numpy in float32": error, "right": differs == 0 and error <= PREFILL,
        }  # fmt: skip


def _logits(shards: Sequence[Shard], model: ModelSpec, step: Step) -> list[FloatArray]:
    layers = Layers(0, model.n_layers)
    return [shard.logits(shard.run(layers, shard.embed(step), step), range(step.n_tokens)) for shard in shards]


def _steps(n: int, vocab_size: int) -> Iterator[Step]:
    """A sequence of n positions and a short one, which grow together, the first over 256 if n is 254; then a third,
    which the others leave again."""

    def step(kv: Sequence[KvOp], *rows: tuple[int, int, int]) -> Step:
        tokens = [(31 * sequence + 7 * position + 1) % vocab_size
                  for sequence, start, count in rows for position in range(start, start + count)]  # fmt: skip
        return Step(tuple(Chunk(*row) for row in rows), tuple(kv), tuple(tokens))

    opened = [KvOp(KvKind.OPEN, sequence, capacity=300) for sequence in range(3)]
    yield step(opened[:2], (0, 0, n), (1, 0, 1))
    for i in range(4):
        yield step((), (0, n + i, 1), (1, 1 + i, 1))
    yield step([*opened[2:], KvOp(KvKind.MOVE, 0, length=1, capacity=300, source=0)], (2, 0, 1), (0, 1, 1), (1, 5, 1))
    yield step([KvOp(KvKind.DROP, 0)], (2, 1, 1), (1, 6, 1))
    yield step([KvOp(KvKind.DROP, 1)], (2, 2, 1))
