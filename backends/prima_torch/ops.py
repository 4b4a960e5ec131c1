"""`Ops` by torch operations, on any device: the whole of it on CPUs and where Triton is absent.

Weights lie on the device as in the file, rearranged (`planes.py`); a product dequantises some rows at a time. A row's
result may differ with its company, as vendors' matrix products choose their order of sums by shape: by no more than
TOLERANCE of the largest result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import Slice, Weight
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_torch.graphs import Recorder
from prima_torch.kv import PAGE, Half, LayerKv, Pass, TorchKv, heads_of, read, write
from prima_torch.memory import room_for
from prima_torch.planes import Planes, empty, fill, fill_here, part
from prima_torch.staging import Staging
from prima_torch.unpack import Unpacker

TOLERANCE = 1e-5
PIECE_WEIGHTS = 1 << 22
"""Weights that are dequantised at once."""
PIECE_SCORES = 1 << 24
"""Scores of attention that are computed at once: a long prefill has more than fit in memory."""
PIECE_KEYS = 1 << 25
"""Values of K, those of a head for each query head that reads it, which are copied at once: 128 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix on the device, with the bias f32 [outputs] of its linear map; or a stack of those of experts."""

    planes: Planes
    outputs: int
    bias: torch.Tensor | None = None

    def expert(self, index: int) -> Matrix:
        """One matrix of a stack, a view."""
        return Matrix(part(self.planes, index * self.outputs, (index + 1) * self.outputs), self.outputs)


class TorchOps:
    """`uploaded_bytes`: what all matrices so far take on the device."""

    copies = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploaded_bytes = 0
        self._unpacker = Unpacker(device)
        self._staging: Staging | None = None

    def recorder(self) -> Recorder | None:
        """What records passes of these ops: None, as they look at values on the host."""
        return None

    # -- at load

    def vector(self, weight: Weight) -> torch.Tensor:
        return self._unpacker.rows(self._upload(weight, 1), 0, 1)[0]

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        planes = self._upload(weight, prod(weight.shape[:-1]))
        self.uploaded_bytes += planes.n_bytes
        return Matrix(planes, weight.shape[-2], None if bias is None else self.vector(bias))

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> TorchKv:
        return TorchKv(part, n_kv_heads, head_dim, self.device)

    # -- of `SlotOps`

    def refill(self, slot: Matrix, weight: Weight, bias: Weight | None = None) -> Matrix:
        self._fill(slot.planes, weight)
        return replace(slot, bias=None if bias is None else self.vector(bias))

    def settle(self, x: torch.Tensor) -> torch.Tensor:
        """A GPU keeps the order in which work is queued, and a CPU is done."""
        return x

    def _upload(self, weight: Weight, rows: int) -> Planes:
        with room_for(f"the tensor {weight.name} on {self.device}", hint="free memory, or add a node"):
            planes = empty(weight.type, rows, weight.shape[-1], self.device)
            self._fill(planes, weight)
        return planes

    def _fill(self, planes: Planes, weight: Weight) -> None:
        if self.device.type == "cpu":
            fill_here(planes, weight.data)
            return
        self._staging = self._staging or Staging(self.device)
        for start, data in self._staging.pieces(weight.data.reshape(planes.rows, -1)):
            fill(planes, start, data)

    # -- at the border

    def from_host(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def to_host(self, x: torch.Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = x.cpu().contiguous().numpy()
        return values

    # -- in a pass

    def embedding(self, table: Matrix, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        return self._unpacker.picked(table.planes, torch.as_tensor(ids, device=self.device))

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        y = torch.empty((len(x), matrix.planes.rows), device=self.device)
        for start, stop, weights in self._pieces(matrix.planes):
            torch.mm(x, weights.T, out=y[:, start:stop])
        return y if matrix.bias is None else y.add_(matrix.bias)

    def linears(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> Sequence[torch.Tensor]:
        return [self.linear(x, matrix) for matrix in matrices]

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        runs = x.view(-1, len(gain))
        return (runs / (runs.square().mean(1, keepdim=True) + eps).sqrt() * gain).view(x.shape)

    def rope(self, x: torch.Tensor, rope: Rope[torch.Tensor]) -> torch.Tensor:
        n_pairs = rope.cos.shape[1]
        rotated = x.view(len(x), -1, rope.head_dim)[:, :, : 2 * n_pairs]
        if rope.kind == RopeKind.NEOX:
            first, second = rotated[:, :, :n_pairs], rotated[:, :, n_pairs:]
        else:
            first, second = rotated[:, :, 0::2], rotated[:, :, 1::2]
        cos, sin = rope.cos[:, None], rope.sin[:, None]
        turned = first * cos - second * sin, first * sin + second * cos
        first.copy_(turned[0])  # both are views of x
        second.copy_(turned[1])
        return x

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, kv: Pass, rule: AttentionRule
    ) -> torch.Tensor:
        held, inputs, out = kv.pages[layer], kv.inputs(layer), torch.empty_like(q)
        for i, (start, stop, chunk) in enumerate(kv.spans):
            rows = slice(start, stop)
            write(held.k, inputs.slots[rows], k[rows])
            write(held.v, inputs.slots[rows], v[rows])
            for columns, k_heads, v_heads in by_heads(held, q.shape[1], chunk.start + chunk.count):
                own = q[rows, columns]
                out[rows, columns] = self._attend(own, k_heads, v_heads, inputs.table[i], chunk.start, rule)
        return out

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate).mul_(up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.gelu(gate, approximate="tanh").mul_(up)

    def mixture(
        self, x: torch.Tensor, scores: torch.Tensor, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> torch.Tensor:
        """Rows in the order of their experts, each of which is dequantised once. Looks at the choice on the host: what
        is recorded needs another way."""
        chosen, shares = route(scores, rule)
        order = chosen.flatten().argsort(stable=True)  # of row * n_used + rank
        ranked = torch.empty((len(order), down.outputs), device=self.device)
        start = 0
        for expert, count in enumerate(torch.bincount(chosen.flatten()).tolist()):
            if count:
                own = order[start : start + count]
                hidden = x[own // rule.n_used]
                gates, ups = self.linears(hidden, [gate.expert(expert), up.expert(expert)])
                ranked[own] = self.linear(self.swiglu(gates, ups), down.expert(expert))
                start += count
        return (ranked.view(len(x), rule.n_used, -1) * shares[:, :, None]).sum(1)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.add_(x)

    # -- below

    def _pieces(self, planes: Planes) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Ranges of rows, and their weights in float32."""
        step = planes.rows if planes.type is GGUFType.F32 else max(1, PIECE_WEIGHTS // planes.columns)
        for start in range(0, planes.rows, step):
            stop = min(planes.rows, start + step)
            yield start, stop, self._unpacker.rows(planes, start, stop)

    def _attend(
        self, q: torch.Tensor, k: Half, v: Half, table: torch.Tensor, start: int, rule: AttentionRule
    ) -> torch.Tensor:
        """Rows of q [n, n_heads * head_dim] stand at positions from `start` on of the pages in `table`."""
        keys, values, first = seen(k, v, table, start, len(q), rule)
        step = max(1, PIECE_SCORES // (keys.shape[1] * q.shape[1] // keys.shape[2]))
        starts = range(0, len(q), step)
        return torch.cat([attend(q[row : row + step], keys, values, start + row - first, rule) for row in starts])


def by_heads(kv: LayerKv, width: int, n_seen: int) -> Iterator[tuple[slice, Half, Half]]:
    """Runs of heads of K and V that are not too many to be copied over `n_seen` positions, each with the columns of the
    queries [n, width] that read it."""
    n_kv_heads = kv.k.values.shape[2]
    step = max(1, PIECE_KEYS * n_kv_heads // (n_seen * width))
    for first in range(0, n_kv_heads, step):
        stop = min(n_kv_heads, first + step)
        columns = slice(first * width // n_kv_heads, stop * width // n_kv_heads)
        yield columns, heads_of(kv.k, first, stop), heads_of(kv.v, first, stop)


def seen(
    k: Half, v: Half, table: torch.Tensor, start: int, n: int, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values f32 [n_kv_heads, positions, head_dim] that rows at `start` to start + n may see, from a first
    position on, which is given too."""
    first_page = max(0, start + 1 - rule.window) // PAGE if rule.window else 0
    first, end = first_page * PAGE, start + n
    pages = table[first_page : -(-end // PAGE)]
    keys, values = (read(half, pages)[: end - first].transpose(0, 1) for half in (k, v))
    return keys, values, first


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, rule: AttentionRule) -> torch.Tensor:
    """q [n, n_heads * head_dim] at positions start, ... sees keys and values [n_kv_heads, positions, head_dim]."""
    n, (n_kv_heads, n_seen, head_dim) = len(q), keys.shape
    heads = q.view(n, n_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [n_kv_heads, heads of a group, n, head_dim]
    scores = heads.flatten(1, 2) @ keys.transpose(1, 2) * rule.scale
    if rule.softcap:
        scores = (scores / rule.softcap).tanh_().mul_(rule.softcap)
    by_row = scores.view(n_kv_heads, -1, n, n_seen)
    by_row.masked_fill_(hidden_positions(start, n, n_seen, rule.window, q.device), -torch.inf)
    mixed = scores.softmax(-1) @ values
    return mixed.view(n_kv_heads, -1, n, head_dim).permute(2, 0, 1, 3).reshape(q.shape)


def hidden_positions(start: int, n: int, n_seen: int, window: int, device: torch.device) -> torch.Tensor:
    """[n, n_seen]: what rows at positions start, ... may not see."""
    distance = torch.arange(start, start + n, device=device)[:, None] - torch.arange(n_seen, device=device)
    return (distance < 0) | (distance >= window) if window else distance < 0


def route(scores: torch.Tensor, rule: RoutingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts i64 and their weights f32, [n, n_used] each, likeliest first."""
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, : rule.n_used]
    shares = scores.double().softmax(1).gather(1, chosen)
    if rule.normalize:
        shares = shares / shares.sum(1, keepdim=True)
    return chosen, (shares * rule.scale).float()
