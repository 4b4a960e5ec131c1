"""Small random models in memory: float32 arrays, a store over them, and the mathematics once more in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.families import family
from prima_core.interfaces import Weight
from prima_core.model.names import layer_tensor
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind, RopeSpec
from prima_core.model.spec import ModelSpec

Arrays = dict[str, NDArray[np.float32]]
Double = NDArray[np.float64]


@dataclass(frozen=True)
class SmallModel:
    spec: ModelSpec
    shared: Arrays
    layers: tuple[Arrays, ...]

    def store(self) -> ArrayStore:
        return ArrayStore(self)


class ArrayStore:
    """Counts what is acquired and released; gives the same mapping each time, as a store of pinned weights does."""

    def __init__(self, model: SmallModel) -> None:
        self.shared_weights = {name: f32_weight(name, values) for name, values in model.shared.items()}
        self.layers = [
            {name: f32_weight(layer_tensor(index, name), values) for name, values in layer.items()}
            for index, layer in enumerate(model.layers)
        ]
        self.held: list[int] = []
        self.log: list[int] = []
        self.given_back: list[str] = []

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        self.held.append(layer)
        self.log.append(layer)
        return self.layers[layer]

    def release(self, layer: int) -> None:
        self.held.remove(layer)

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self.layers[layer]

    def give_back(self, weights: Iterable[Weight]) -> None:
        self.given_back += [weight.name for weight in weights]

    def shared(self) -> Mapping[str, Weight]:
        return self.shared_weights

    def is_streamed(self, name: str) -> bool:
        return False

    def blocks(self, name: str) -> Iterator[Weight]:
        yield self.shared_weights[name]

    def close(self) -> None: ...


def f32_weight(name: str, values: NDArray[np.float32]) -> Weight:
    data = np.frombuffer(values.tobytes(), np.uint8)  # read-only, as a view into the map
    return Weight(name, GGUFType.F32, values.shape, data)


def small_spec(
    arch: str = "llama",
    *,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 8,
    rope_dim: int | None = None,
    factor: float = 1.0,
    tied_output: bool = False,
) -> ModelSpec:
    rope = RopeSpec(rope_dim or head_dim, theta=100.0, factor=factor)
    return ModelSpec(
        arch, "small", n_layers, 24, n_heads, n_kv_heads, head_dim, 40, 50, 128, 1e-5, rope, tied_output
    )  # fmt: skip


def small_model(spec: ModelSpec, *, rope_factors: bool = False, seed: int = 0) -> SmallModel:
    """Random weights with gains that keep activations near 1. `rope_factors`: as llama3 has them."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return random.normal(0, 1.5 / columns**0.5, (rows, columns)).astype(np.float32)

    def vector(n: int, mean: float = 0) -> NDArray[np.float32]:
        return random.normal(mean, 0.3, n).astype(np.float32)

    d, d_ff, d_q, d_kv = spec.d_model, spec.d_ff, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim

    def layer() -> Arrays:
        arrays = {
            "attn_norm.weight": vector(d, mean=1), "ffn_norm.weight": vector(d, mean=1),
            "attn_q.weight": matrix(d_q, d), "attn_k.weight": matrix(d_kv, d), "attn_v.weight": matrix(d_kv, d),
            "attn_output.weight": matrix(d, d_q),
            "ffn_gate.weight": matrix(d_ff, d), "ffn_up.weight": matrix(d_ff, d), "ffn_down.weight": matrix(d, d_ff),
        }  # fmt: skip
        if spec.arch == "qwen2":
            arrays |= {"attn_q.bias": vector(d_q), "attn_k.bias": vector(d_kv), "attn_v.bias": vector(d_kv)}
        return arrays

    shared = {"token_embd.weight": matrix(spec.vocab_size, d), "output_norm.weight": vector(d, mean=1)}
    if not spec.tied_output:
        shared["output.weight"] = matrix(spec.vocab_size, d)
    if rope_factors:
        shared["rope_freqs.weight"] = random.uniform(1, 8, spec.rope.dim // 2).astype(np.float32)
    return SmallModel(spec, shared, tuple(layer() for _ in range(spec.n_layers)))


def logits_in_float64(model: SmallModel, ids: list[int]) -> Double:
    """[n, vocab]: full attention over the whole text, no cache, no steps; written from the papers, not from prima."""
    spec, shared = model.spec, {name: values.astype(np.float64) for name, values in model.shared.items()}
    x = shared["token_embd.weight"][ids]
    for arrays in model.layers:
        layer = {name: values.astype(np.float64) for name, values in arrays.items()}
        x = x + _attention(spec, shared, layer, _normed(x, layer["attn_norm.weight"], spec.norm_eps))
        h = _normed(x, layer["ffn_norm.weight"], spec.norm_eps)
        gate, up = h @ layer["ffn_gate.weight"].T, h @ layer["ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["ffn_down.weight"].T
    output = shared["token_embd.weight" if spec.tied_output else "output.weight"]
    logits: Double = _normed(x, shared["output_norm.weight"], spec.norm_eps) @ output.T
    return logits


def _normed(x: Double, gain: Double, eps: float) -> Double:
    normed: Double = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * gain
    return normed


def _attention(spec: ModelSpec, shared: Mapping[str, Double], layer: Mapping[str, Double], h: Double) -> Double:
    def heads(name: str, count: int) -> Double:
        flat = h @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", np.zeros(count * spec.head_dim))
        return flat.reshape(len(h), count, spec.head_dim)

    factors = shared.get("rope_freqs.weight", np.ones(spec.rope.dim // 2))
    q = _rotated(spec, heads("attn_q", spec.n_heads), factors)
    k = _rotated(spec, heads("attn_k", spec.n_kv_heads), factors)
    v = heads("attn_v", spec.n_kv_heads)
    group = spec.n_heads // spec.n_kv_heads
    mixed = np.zeros_like(q)
    for head in range(spec.n_heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(spec.head_dim)
        scores[np.triu_indices(len(h), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
    out: Double = mixed.reshape(len(h), -1) @ layer["attn_output.weight"].T
    return out


def _rotated(spec: ModelSpec, x: Double, factors: Double) -> Double:
    """Each pair is a complex number, multiplied by e^(i * position * frequency)."""
    dim = spec.rope.dim
    pairs = [
        (2 * i, 2 * i + 1) if family(spec.arch).rope == RopeKind.NORM else (i, i + dim // 2) for i in range(dim // 2)
    ]
    out = x.copy()
    for position in range(len(x)):
        for i, (real, imaginary) in enumerate(pairs):
            angle = position / spec.rope.factor * spec.rope.theta ** (-2 * i / dim) / factors[i]
            turned = (x[position, :, real] + 1j * x[position, :, imaginary]) * np.exp(1j * angle)
            out[position, :, real], out[position, :, imaginary] = turned.real, turned.imag
    return out
