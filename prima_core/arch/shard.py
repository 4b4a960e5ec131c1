"""The executable form of a part of a model, for every backend that offers `Ops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.blocks import Bind, Blocks, BlocksInPlace, CopiedBlocks
from prima_core.arch.ends import Ends
from prima_core.arch.families import family
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.rope import Rope, rope_angles, rope_factors, rope_frequencies
from prima_core.errors import FrameError, PlanError
from prima_core.interfaces import Layers, Slice, Step, Store
from prima_core.model.rope import RopeSpec
from prima_core.model.spec import ModelSpec

FloatArray = NDArray[np.float32]


class OpsShard(Generic[A, W, K]):
    """`interfaces.Shard` over ops and a store, which stays the caller's.

    Every layer is bound before it is ready, and uploaded, where a device does that, as far as it stays. Raises
    ModelError when the family is not supported, and what the ops raise.
    """

    def __init__(self, ops: Ops[A, W, K], model: ModelSpec, part: Slice, store: Store) -> None:
        self._ops, self._model, self._part = ops, model, part
        self._family = family(model.arch)
        shared = store.shared()
        factors = rope_factors(model.rope, shared, part.context or model.context_length)
        self._frequencies = {model.rope: rope_frequencies(model.rope, factors)}
        if model.local_rope is not None:
            self._frequencies[model.local_rope] = rope_frequencies(model.local_rope, None)
        self._ends = Ends(ops, model, part, store)
        self.blocks: Blocks[A, K] = (CopiedBlocks if ops.copies else BlocksInPlace)(ops, _bind(ops, model), store)
        for layer in (layer for layers in part.layers for layer in layers):
            self.blocks.load(layer)
        self._kv = ops.kv_cache(part, model.n_kv_heads, model.head_dim)

    def embed(self, step: Step) -> FloatArray:
        """[n_tokens, d_model] f32. Raises PlanError without the input part, FrameError for ids that do not exist."""
        if not self._part.has_input:
            raise PlanError("this shard has no input part", hint="the plan sends tokens to the wrong node")
        if len(step.tokens) != step.n_tokens:
            raise FrameError(f"a step of {step.n_tokens} rows carries {len(step.tokens)} token ids")
        wrong = [token for token in step.tokens if not 0 <= token < self._model.vocab_size]
        if wrong:
            raise FrameError(f"token id {wrong[0]} is outside the vocabulary of {self._model.vocab_size}")
        if not step.tokens:  # a step that only changes KV
            return np.empty((0, self._model.d_model), np.float32)
        rows = self._look_up(step.tokens)
        return rows * np.float32(self._model.d_model**0.5) if self._family.scaled_embedding else rows

    def run(self, layers: Layers, activation: FloatArray, step: Step) -> FloatArray:
        """The activation after `layers`, [n_tokens, d_model] f32.

        Raises PlanError for layers that are not here, FrameError and DeviceMemoryError as `KvCache.begin`.
        """
        self._check_layers(layers)
        self._check_activation(activation, step.n_tokens)
        kv = self._kv.begin(layers, step)
        return self.forward(layers, activation, step, kv) if step.chunks else activation

    def logits(self, activation: FloatArray, rows: Sequence[int]) -> FloatArray:
        """[len(rows), vocab_size] f32. Raises PlanError without the output part, FrameError for rows out of range."""
        if not self._part.has_output:
            raise PlanError("this shard has no output part", hint="the plan asks the wrong node for logits")
        self._check_activation(activation, len(activation))
        if any(not 0 <= row < len(activation) for row in rows):
            raise FrameError(f"logits are asked for rows {list(rows)} of {len(activation)}")
        logits = self._project(activation[list(rows)])
        cap = np.float32(self._model.logit_softcap)
        return np.tanh(logits / cap) * cap if cap else logits

    def close(self) -> None:
        """Lets weights and KV go; every later call raises PlanError. Idempotent."""
        self._part = Slice(())
        self._ends.close()
        self.blocks.close()
        self._kv.close()

    # -- what was checked, from host to host: a backend that records passes (CUDA graphs) overrides these three

    def look_up(self, table: W, ids: Sequence[int]) -> FloatArray:
        """Rows `ids` of the token embeddings."""
        return self._ops.to_host(self._ops.embedding(table, ids))

    def forward(self, layers: Layers, activation: FloatArray, step: Step, kv: K) -> FloatArray:
        """The activation after `layers`, for a step with chunks."""
        ops = self._ops
        turns = {rope: (ops.from_host(cos), ops.from_host(sin)) for rope, (cos, sin) in self.turns(step).items()}
        return ops.to_host(self.compute(layers, ops.from_host(activation), self.ropes(turns), kv))

    def project(self, norm: A, matrix: W, x: FloatArray) -> FloatArray:
        """Logits of the rows of x, without the softcap."""
        return self._ops.to_host(self.head(norm, matrix, self._ops.from_host(x)))

    # -- on the device

    def head(self, norm: A, matrix: W, x: A) -> A:
        return self._ops.linear(self._ops.rms_norm(x, norm, self._model.norm_eps), matrix)

    def compute(self, layers: Layers, x: A, ropes: Mapping[RopeSpec, Rope[A]], kv: K) -> A:
        """The layers one after the other."""
        for layer in layers:
            x = self.blocks.apply(layer, x, ropes[self._model.layer_rope(layer)], kv)
        return x

    def turns(self, step: Step) -> dict[RopeSpec, tuple[FloatArray, FloatArray]]:
        """Cosines and sines [n_tokens, dim / 2] of each of the model's ropes for the rows of a step."""
        return {rope: _turns(rope, frequencies, step) for rope, frequencies in self._frequencies.items()}

    def ropes(self, turns: Mapping[RopeSpec, tuple[A, A]]) -> dict[RopeSpec, Rope[A]]:
        """`turns` that are on the device, as blocks take them."""
        kind, head_dim = self._family.rope, self._model.head_dim
        return {rope: Rope(kind, head_dim, cos, sin) for rope, (cos, sin) in turns.items()}

    # -- ends, streamed or not

    def _look_up(self, ids: Sequence[int]) -> FloatArray:
        table = self._ends.table()
        if table is not None:
            return self.look_up(table, ids)
        return self._ops.to_host(self._ops.embedding(self._ends.rows(ids), range(len(ids))))

    def _project(self, x: FloatArray) -> FloatArray:
        norm, matrix, ops = self._ends.norm, self._ends.output(), self._ops
        assert norm is not None, "the part has an output"
        if matrix is not None:
            return self.project(norm, matrix, x)
        normed = ops.rms_norm(ops.from_host(x), norm, self._model.norm_eps)
        # To the host before the next piece is asked for, which may lie where this one does.
        return np.concatenate([ops.to_host(ops.linear(normed, piece)) for piece in self._ends.output_pieces()], axis=1)

    def _check_layers(self, layers: Layers) -> None:
        if not any(own.start <= layers.start <= layers.stop <= own.stop for own in self._part.layers):
            own = ", ".join(f"[{own.start}, {own.stop})" for own in self._part.layers) or "none"
            raise PlanError(
                f"layers [{layers.start}, {layers.stop}) are not on this shard", hint=f"it was loaded with {own}"
            )

    def _check_activation(self, activation: FloatArray, n_rows: int) -> None:
        expected = (n_rows, self._model.d_model)
        if activation.shape != expected or activation.dtype != np.float32:
            raise FrameError(
                f"an activation is {activation.dtype} {list(activation.shape)}, expected float32 {list(expected)}"
            )


def _bind(ops: Ops[A, W, K], model: ModelSpec) -> Bind[A, W, K]:
    """Not a method, lest a shard that fails to load is kept alive, with what was uploaded, by itself."""
    block = family(model.arch).block
    return lambda binder, layer, weights: block(ops, binder, model, layer, weights)


def _turns(rope: RopeSpec, frequencies: NDArray[np.float64], step: Step) -> tuple[FloatArray, FloatArray]:
    angles = rope_angles(frequencies, step.chunks)
    return (np.cos(angles) * rope.amplitude).astype(np.float32), (np.sin(angles) * rope.amplitude).astype(np.float32)
