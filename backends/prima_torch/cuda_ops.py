"""`Ops` by Triton kernels and the vendor's matrix product.

Few rows at a time (decoding) never leave what a CUDA graph can record: no look at values on the host, and the bits of a
row do not depend on the rows beside it. With many rows (prefill) a matrix is dequantised to bfloat16, some rows at a
time, and multiplied by the vendor's product, whose result differs by up to PREFILL_TOLERANCE of the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_torch.graphs import CudaGraphs, Recorder
from prima_torch.kernels import elementwise, routing
from prima_torch.kernels.attention import decode_attention
from prima_torch.kernels.kv_write import write_kv
from prima_torch.kernels.linear import MAX_TOKENS, dequantize, matvec, matvec_experts
from prima_torch.kernels.shapes import SHAPES
from prima_torch.kv import Half, Pass
from prima_torch.ops import Matrix, TorchOps, hidden_positions, seen
from prima_torch.planes import Planes, part
from prima_torch.unpack import FLOATS, as_floats

PREFILL_TOLERANCE = 2e-2
"""Weights and activations have the 8 bits of bfloat16, sums are float32."""
MOST_BY_KERNEL = 4 * MAX_TOKENS
"""Rows up to which a product reads the blocks once for every MAX_TOKENS of them. To write a matrix as bfloat16 and read
it again moves as many bytes as 8 such readings of 4-bit blocks."""
DENSE_WEIGHTS = 1 << 26
"""Weights that are dequantised at once: 128 MiB of bfloat16."""


class CudaOps(TorchOps):
    """On a GPU; in Triton's interpreter, for tests, on the CPU, where the products of many rows are float32."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._dense = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        self._product = _product(self._dense, device)

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        block = SHAPES[weight.type].block
        if weight.shape[-1] % block:
            raise ModelError(
                f"rows of {weight.shape[-1]} weights are no multiple of the {block} of {weight.type.name}'s kernels",
                field=weight.name,
                hint="compute by torch's own operations (--kernels torch)",
            )
        return super().matrix(weight, bias)

    def recorder(self) -> Recorder | None:
        return CudaGraphs(self.device) if self.device.type == "cuda" else None

    def from_host(self, values: NDArray[np.float32]) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton launches kernels; each pass of a device begins here
        return super().from_host(values)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        if len(x) <= MAX_TOKENS:
            return matvec(x, matrix.planes, matrix.bias)
        if len(x) <= MOST_BY_KERNEL:
            runs = (x[start : start + MAX_TOKENS] for start in range(0, len(x), MAX_TOKENS))
            return torch.cat([matvec(rows, matrix.planes, matrix.bias) for rows in runs])
        return self._of_many(x.to(self._dense), matrix)

    def linears(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> Sequence[torch.Tensor]:
        if len(x) <= MOST_BY_KERNEL:
            return super().linears(x, matrices)
        dense = x.to(self._dense)
        return [self._of_many(dense, matrix) for matrix in matrices]

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        return elementwise.rms_norm(x, gain, eps)

    def rope(self, x: torch.Tensor, rope: Rope[torch.Tensor]) -> torch.Tensor:
        return elementwise.rope(x, rope)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return elementwise.swiglu(gate, up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return elementwise.geglu(gate, up)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, kv: Pass, rule: AttentionRule
    ) -> torch.Tensor:
        if not kv.decodes:
            return super().attention(q, k, v, layer, kv, rule)
        held, inputs = kv.pages[layer], kv.inputs(layer)
        write_kv(k, held.k.values, held.k.scales, inputs.slots)
        write_kv(v, held.v.values, held.v.scales, inputs.slots)
        return decode_attention(
            q,
            held.k.values,
            held.v.values,
            inputs.table,
            inputs.lengths,
            rule,
            held.k.values.shape[2],
            kv.longest,
            held.k.scales,
            held.v.scales,
        )

    def mixture(
        self, x: torch.Tensor, scores: torch.Tensor, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> torch.Tensor:
        """Few rows: each reads its own experts, chosen on the device. Many: see `TorchOps.mixture`."""
        if len(x) > MAX_TOKENS:
            return super().mixture(x, scores, gate, up, down, rule)
        experts, weights = routing.route(scores, rule)
        chosen, own = experts.view(-1), x.repeat_interleave(rule.n_used, 0)
        gates, ups = (matvec_experts(own, stack.planes, stack.outputs, chosen) for stack in (gate, up))
        return routing.mix(matvec_experts(self.swiglu(gates, ups), down.planes, down.outputs, chosen), weights)

    # -- below: many rows

    def _of_many(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        planes = matrix.planes
        step = max(1, DENSE_WEIGHTS // planes.columns)
        if step >= planes.rows:
            y = self._product(x, self._dense_rows(planes, 0, step))
        else:  # logits of many rows, which shall not be there twice
            y = torch.empty((len(x), planes.rows), device=self.device)
            for row in range(0, planes.rows, step):
                y[:, row : row + step] = self._product(x, self._dense_rows(planes, row, step))
        return y if matrix.bias is None else y.add_(matrix.bias)

    def _dense_rows(self, planes: Planes, start: int, n: int) -> torch.Tensor:
        """[rows, columns]; what is stored so already is not copied."""
        rows = part(planes, start, min(planes.rows, start + n))
        if FLOATS.get(planes.type) is self._dense:
            return as_floats(rows)
        out = torch.empty((rows.rows, planes.columns), dtype=self._dense, device=self.device)
        dequantize(planes, out, start)
        return out

    def _attend(
        self, q: torch.Tensor, k: Half, v: Half, table: torch.Tensor, start: int, rule: AttentionRule
    ) -> torch.Tensor:
        """By the vendor's attention, in half precision where K and V have no more; it knows no softcap."""
        if rule.softcap:
            return super()._attend(q, k, v, table, start, rule)
        keys, values, first = seen(k, v, table, start, len(q), rule)
        is_half = self.device.type == "cuda" and k.values.dtype is not torch.float32
        dtype = torch.float16 if is_half else torch.float32
        n, (n_kv_heads, n_seen, head_dim) = len(q), keys.shape
        heads = q.view(n, -1, head_dim).transpose(0, 1)[None].to(dtype)
        group = heads.shape[1] // n_kv_heads
        keys, values = (half.to(dtype).repeat_interleave(group, 0)[None] for half in (keys, values))
        is_square = n == n_seen and not 0 < rule.window < n
        mask = None if is_square else ~hidden_positions(start - first, n, n_seen, rule.window, q.device)
        mixed = functional.scaled_dot_product_attention(
            heads, keys, values, mask, is_causal=is_square, scale=rule.scale
        )
        return mixed[0].transpose(0, 1).reshape(q.shape).to(torch.float32)


def multiplies_bfloat16(device: torch.device) -> bool:
    """From Ampere on: what is older is slower at it than with float32, if it can do it at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _product(dense: torch.dtype, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """x [n, columns] @ weights [rows, columns].T -> f32 [n, rows]."""
    if dense is torch.float32:
        return lambda x, weights: torch.mm(x, weights.T)
    try:
        probe = torch.zeros((16, 16), dtype=dense, device=device)
        torch.mm(probe, probe, torch.float32)
    except (RuntimeError, TypeError):  # before torch 2.8 results are rounded to the type of the factors
        return lambda x, weights: torch.mm(x, weights.T).to(torch.float32)
    return lambda x, weights: torch.mm(x, weights.T, torch.float32)
