"""The operations that model families are written against: what a backend implements to run every family.

Arrays live where the backend computes and are opaque to families; only `from_host` and `to_host` cross the border.
A row's result may not depend on its company: an operation on n rows gives each row the bits that it would get alone;
where a vendor's matrix product decides (prefill on a GPU), it differs by no more than the backend's stated tolerance.
Nothing between `from_host` and `to_host` looks at values on the host, so a backend may record a pass (CUDA graphs) or
stay lazy (MLX). One owner thread makes all calls.

Type variables: `A` an array on the device, float32 [n_tokens, width] or [width]; `W` a matrix as the device
holds it (uploaded, repacked, or a view into the map); `K` what attention needs to know of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prima_core.arch.rope import Rope
    from prima_core.interfaces import Layers, Slice, Step, Weight

A = TypeVar("A")
W = TypeVar("W")
K = TypeVar("K")
K_co = TypeVar("K_co", covariant=True)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer attends. `scale` multiplies q . K; `softcap` c > 0 turns scores s into c * tanh(s / c); with a
    `window` w > 0 position p sees p - w + 1 to p only."""

    scale: float
    softcap: float = 0.0
    window: int = 0


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """How tokens choose experts: the `n_used` with the highest softmax(scores), ties to the lower index.

    Their weights are these probabilities, divided by their sum if `normalize`, times `scale`.
    """

    n_used: int
    normalize: bool = True
    scale: float = 1.0


class KvCache(Protocol[K_co]):
    """K and V of the layers of one shard, by sequence."""

    def begin(self, layers: Layers, step: Step) -> K_co:
        """Apply `step.kv` to `layers` and get ready for the step's chunks.

        All or nothing: raises FrameError for an operation on an unknown sequence (other than drop), for a chunk
        beyond its sequence's capacity, or one that leaves a gap of positions never written; DeviceMemoryError where
        there is no room. After an error the cache is as before.
        """
        ...

    def close(self) -> None:
        """Give all room back. Idempotent."""
        ...


class Ops(Protocol[A, W, K]):
    """Fifteen operations. Widths are in elements."""

    @property
    def copies(self) -> bool:
        """Whether `vector` and `matrix` copy what they take: then the store gives those bytes back after binding."""
        ...

    # -- at load

    def vector(self, weight: Weight) -> A:
        """A norm's gain or another small vector as a float32 array [n]."""
        ...

    def matrix(self, weight: Weight, bias: Weight | None = None) -> W:
        """A matrix [outputs, inputs], with the bias [outputs] of its linear map if it has one; or the matrices of all
        experts, [experts, outputs, inputs].

        Valid while the layer of `weight` is acquired from the store. Raises ModelError for a type that the backend
        lacks, DeviceMemoryError where there is no room.
        """
        ...

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> KvCache[K]:
        """An empty cache for the layers of `part`, in its KV type; room comes with the operations inside steps.

        `part.kv_tokens` may be allocated now. Raises ModelError for a type that the backend lacks or that head_dim does
        not fit, DeviceMemoryError.
        """
        ...

    # -- at the border

    def from_host(self, values: NDArray[np.float32]) -> A: ...

    def to_host(self, x: A) -> NDArray[np.float32]:
        """A contiguous host array that the backend does not change any more."""
        ...

    # -- in a pass

    def embedding(self, table: W, ids: Sequence[int]) -> A:
        """Rows `ids` of the table, [len(ids), inputs]. The ids were checked."""
        ...

    def linear(self, x: A, matrix: W) -> A:
        """x @ matrix.T + bias: [n, inputs] -> [n, outputs]."""
        ...

    def linears(self, x: A, matrices: Sequence[W]) -> Sequence[A]:
        """`linear` of the same x by each matrix, in one go where that pays: q, k, v; gate, up."""
        ...

    def rms_norm(self, x: A, gain: A, eps: float) -> A:
        """Each run of len(gain) elements divided by its root mean square (of mean + eps), times `gain`.

        A gain shorter than the row normalises each head alone.
        """
        ...

    def rope(self, x: A, rope: Rope[A]) -> A:
        """Each head of x [n, heads * head_dim] rotated by its row's angles. `x` may be overwritten."""
        ...

    def attention(self, q: A, k: A, v: A, layer: int, kv: K, rule: AttentionRule) -> A:
        """Write k and v [n, n_kv_heads * head_dim] at their positions in `layer`'s cache, then attend causally.

        For each row and head: softmax(q . K * scale) . V over the positions up to the row's own that `rule` lets it
        see. Query head h reads K/V head h // (n_heads / n_kv_heads). Returns [n, n_heads * head_dim].
        """
        ...

    def swiglu(self, gate: A, up: A) -> A:
        """gate * sigmoid(gate) * up. `gate` may be overwritten."""
        ...

    def geglu(self, gate: A, up: A) -> A:
        """gelu(gate) * up, by the tanh approximation of gelu. `gate` may be overwritten."""
        ...

    def mixture(self, x: A, scores: A, gate: W, up: W, down: W, rule: RoutingRule) -> A:
        """The chosen experts' answers to each row of x [n, d_model], weighted and added up: [n, d_model].

        scores [n, experts] are the router's. Expert e answers down[e] @ swiglu(gate[e] @ x, up[e] @ x); gate and up
        are [experts, d_ff, d_model], down is [experts, d_model, d_ff]. Only the chosen experts' bytes are read.
        """
        ...

    def add(self, x: A, y: A) -> A:
        """x + y. `y` may be overwritten, `x` not."""
        ...
