"""The native kernels as typed Python: `load_kernels()` gives them, or None where the module was not built.

Arrays are C-contiguous float32 unless said otherwise; a wrong shape, type or layout is a ValueError that names the
argument, and nothing is read or written out of bounds. Every CPU variant and every number of threads gives the same
bits, and a row's result does not depend on the other rows of a call. Calls release the GIL and run one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prima_core.model.rope import RopeKind
from prima_numpy.native_module import native_fault
from prima_numpy.threads import default_threads
from prima_numpy.variants import asked_variant, open_engine

if TYPE_CHECKING:
    from prima_core.arch.ops import AttentionRule
    from prima_core.arch.rope import Rope
    from prima_core.interfaces import Weight
    from prima_numpy import _kernels

Float32s = NDArray[np.float32]
Int64s = NDArray[np.int64]
KvCache = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.uint8]
KvSpan = tuple[KvCache, KvCache, int, int]
"""K, V, start, n: the next n rows of a call are positions start, start + 1, ... of a sequence with these caches.

The caches are both float16 or both float32, [n_kv_heads, capacity, head_dim], or uint8 blocks of Q8_0, [n_kv_heads,
capacity, head_dim / 32 * 34]."""

MAX_THREADS = 1024


def load_kernels(threads: int = 0, variant: str | None = None) -> Kernels | None:
    """Kernels with a pool of `threads` (0: `default_threads()`), or None when the native module is not usable.

    `variant` is one of `Kernels.variants()` or "auto" for the best; None: what PRIMA_CPU says, else "auto".
    Raises ConfigError for a variant that does not exist or that this CPU cannot run.
    """
    if native_fault():
        return None
    return Kernels(threads, variant or asked_variant())


@dataclass(frozen=True, slots=True)
class Matrix:
    """What `Kernels.matrix` gives; any `Kernels` may use it."""

    held: _kernels.Matrix
    rows: int
    cols: int


class Kernels:
    """The kernels of one CPU variant and the thread pool they run on.

    `out` arguments are written and returned; without one a fresh array is made.
    """

    def __init__(self, threads: int = 0, variant: str = "auto") -> None:
        self._engine = open_engine(threads or default_threads(), variant)

    @staticmethod
    def variants() -> tuple[str, ...]:
        """The variants that this CPU can run, best first."""
        from prima_numpy import _kernels

        return tuple(_kernels.variants())

    @property
    def threads(self) -> int:
        return self._engine.threads

    @property
    def variant(self) -> str:
        return self._engine.variant

    def describe(self) -> Mapping[str, str]:
        """Facts for `prima doctor`."""
        from prima_numpy import _kernels

        features = " ".join(name for name, is_present in _kernels.cpu_features() if is_present)
        return {
            "kernels": f"native, {self.variant}",
            "threads": str(self.threads),
            "variants": " ".join(self.variants()),
            "cpu": features,
            "build": _kernels.build_info(),
        }

    def matrix(self, weight: Weight, bias: Float32s | None = None) -> Matrix:
        """A weight [rows, cols] and the bias [rows] of its map, checked once. Keeps both arrays alive.

        It is as good as the memory of `weight.data`: of a map that is gone nothing may be computed.
        """
        from prima_numpy import _kernels

        rows, cols = weight.shape
        return Matrix(_kernels.Matrix(self._engine, int(weight.type), weight.data, rows, cols, bias), rows, cols)

    def linear(
        self, weight: Weight, x: Float32s, bias: Float32s | None = None, out: Float32s | None = None
    ) -> Float32s:
        """x [n, cols] . weight [rows, cols] transposed + bias [rows] -> [n, rows], straight from the weight's blocks.

        With quantised weights, x is rounded to int8 first (see `quant.py`, which gives the same bits).
        """
        return self.products((self.matrix(weight, bias),), x, outs=None if out is None else (out,))[0]

    def products(
        self,
        matrices: Sequence[Matrix],
        x: Float32s,
        gain: Float32s | None = None,
        eps: float = 0.0,
        outs: tuple[Float32s, ...] | None = None,
    ) -> tuple[Float32s, ...]:
        """`linear` of one x by each matrix (q, k, v; gate, up): x is rounded once, the pool is woken once.

        With a `gain` [cols] of `rms_norm(x, gain, eps)`.
        """
        if outs is None:
            outs = tuple([np.empty((len(x), matrix.rows), np.float32) for matrix in matrices])
        self._engine.linear(tuple([matrix.held for matrix in matrices]), x, outs, gain, eps)
        return outs

    def added_product(self, matrix: Matrix, x: Float32s, added: Float32s) -> Float32s:
        """added [n, rows] + `linear`."""
        result = np.empty((len(x), matrix.rows), np.float32)
        self._engine.added_linear(matrix.held, x, added, result)
        return result

    def gated_product(
        self, gate: Matrix, up: Matrix, x: Float32s, is_gelu: bool, gain: Float32s | None = None, eps: float = 0.0
    ) -> Float32s:
        """`swiglu` of both products of x, or `geglu`; with a `gain` as in `products`."""
        result = np.empty((len(x), gate.rows), np.float32)
        self._engine.gated_linear(gate.held, up.held, is_gelu, x, gain, eps, result)
        return result

    def linear_experts(self, stacks: Sequence[Weight], x: Float32s, experts: Int64s, starts: Int64s) -> list[Float32s]:
        """For each stack [n_experts, rows, cols]: rows starts[i] to starts[i + 1] of x [n, cols] by matrix experts[i]
        (of `Weight.places`, where these come when they are needed).

        `starts` goes up from 0 to n. Gives [n, rows] of each stack, with the bits of `linear` by one expert's matrix;
        bytes of other experts are not read, and each expert's only once.
        """
        results = [np.empty((x.shape[0], stack.shape[1]), np.float32) for stack in stacks]
        self._engine.linear_experts(tuple(map(_stack, stacks, results)), x, experts, starts)
        return results

    def rows(self, matrix: Matrix, ids: Int64s, out: Float32s | None = None) -> Float32s:
        """Rows `ids` [n] as float32 [n, cols]: the bits of `dequantize_rows`. IndexError for one that is not there."""
        result = np.empty((len(ids), matrix.cols), np.float32) if out is None else out
        self._engine.rows(matrix.held, ids, result)
        return result

    def rms_norm(self, x: Float32s, gain: Float32s, eps: float, out: Float32s | None = None) -> Float32s:
        """x [n, dim] / sqrt(mean(x^2) + eps) * gain [dim], row by row. `out` may be x."""
        result = np.empty_like(x) if out is None else out
        self._engine.rms_norm(x, gain, eps, result)
        return result

    def rope(self, x: Float32s, cos: Float32s, sin: Float32s, neox: bool) -> None:
        """Rotate the first 2 * half elements of each head of x [n, heads, head_dim] in place; cos and sin [n, half].

        Element i turns with i + half (`neox`) or 2i with 2i + 1.
        """
        self._engine.rope(x, cos, sin, neox)

    def swiglu(self, gate: Float32s, up: Float32s, out: Float32s | None = None) -> Float32s:
        """gate * sigmoid(gate) * up, [n, dim] each. `out` may be one of them."""
        result = np.empty_like(gate) if out is None else out
        self._engine.swiglu(gate, up, result)
        return result

    def geglu(self, gate: Float32s, up: Float32s, out: Float32s | None = None) -> Float32s:
        """gelu(gate) * up by the tanh approximation of gelu, [n, dim] each. `out` may be one of them."""
        result = np.empty_like(gate) if out is None else out
        self._engine.geglu(gate, up, result)
        return result

    def add(self, x: Float32s, y: Float32s, out: Float32s | None = None) -> Float32s:
        """x + y, [n, dim] each. `out` may be one of them."""
        result = np.empty_like(x) if out is None else out
        self._engine.add(x, y, result)
        return result

    def attention(
        self, q: Float32s, spans: Sequence[KvSpan], rule: AttentionRule, out: Float32s | None = None
    ) -> Float32s:
        """Causal attention of rows q [n, n_heads, head_dim], each to its own sequence (see `KvSpan`).

        A row attends to those of the positions up to its own, all written, that `rule` lets it see. Query head h reads
        K/V head h // (n_heads / n_kv_heads).
        """
        result = np.empty_like(q) if out is None else out
        self._engine.attention(q, tuple(spans), rule.scale, rule.softcap, rule.window, result)
        return result

    def rotated_attention(
        self,
        q: Float32s,
        k: Float32s,
        v: Float32s,
        rope: Rope[Float32s],
        spans: Sequence[KvSpan],
        rule: AttentionRule,
        out: Float32s | None = None,
    ) -> Float32s:
        """`rope` of q and k in place, `kv_write` of k and v [n, n_kv_heads, head_dim], then `attention`."""
        result = np.empty_like(q) if out is None else out
        rotation = rope.cos, rope.sin, rope.kind is RopeKind.NEOX
        rules = rule.scale, rule.softcap, rule.window
        self._engine.rotated_attention(q, k, v, *rotation, tuple(spans), *rules, result)
        return result

    def kv_write(self, k: Float32s, v: Float32s, spans: Sequence[KvSpan]) -> None:
        """Rows of k and v [n, n_kv_heads, head_dim] to their positions in the caches.

        A float16 cache gets values rounded to nearest even; blocks of Q8_0 are made as `kv.py` makes them.
        """
        self._engine.kv_write(k, v, tuple(spans))

    def read(self, data: NDArray[np.uint8]) -> int:
        """Read all of `data` with the pool, in the way products read weights, and do nothing else with it.

        The time it takes says how fast memory is for these threads; the result is a checksum without meaning.
        """
        return self._engine.read(data)

    def multiply(self, n_products: int) -> bool:
        """Multiply as products of many rows do, but in registers alone, with nothing to load or to weigh.

        The time it takes says how fast they could be; False where the variant cannot say.
        """
        return self._engine.multiply(n_products)


def _stack(weight: Weight, out: Float32s) -> tuple[int, NDArray[np.uint8], int, int, int, Float32s]:
    n_experts, rows, cols = weight.shape
    return int(weight.type), weight.data, weight.places or n_experts, rows, cols, out
