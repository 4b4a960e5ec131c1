"""Recorders for machines without a GPU, which count what is made and object to what a GPU could not record; and ops
that can be recorded without kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prima_core.arch.ops import AttentionRule
from prima_torch.graphs import Recording, Reruns
from prima_torch.kv import PAGE, Half, Pass, read, write
from prima_torch.ops import Matrix, TorchOps
from prima_torch.shard import BATCHES

HOST_READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::repeat_interleave.Tensor",
}  # fmt: skip
"""Operations whose answer, or its shape, the host waits for."""


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """RuntimeError, as while a CUDA graph is recorded."""

    def __torch_dispatch__(  # type: ignore[no-untyped-def]  # torch calls it with whatever the operation takes
        self, func, types, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ):
        if func._schema.name in HOST_READS:
            raise RuntimeError(f"{func._schema.name} reads on the host")
        return func(*args, **(kwargs or {}))


class CountingRecorder:
    """`Reruns` that keeps count. `alive`: recordings that somebody still holds."""

    def __init__(self) -> None:
        self.made = self.replayed = 0
        self._outputs: list[weakref.ref[torch.Tensor]] = []

    @property
    def alive(self) -> int:
        return sum(output() is not None for output in self._outputs)

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        with NoHostReads():  # type: ignore[no-untyped-call]
            recording = Reruns().record(run)
        self.made += 1
        self._outputs.append(weakref.ref(recording.output))

        def replay() -> object:
            self.replayed += 1
            return recording.replay()

        return Recording(recording.output, replay)


class FailingRecorder:
    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")


class StaticOps(TorchOps):
    """Decode steps by torch operations of fixed shapes, whose arguments are tensors: each row computed alone."""

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        if len(x) > BATCHES[-1]:
            return super().linear(x, matrix)
        return torch.cat([super(StaticOps, self).linear(x[i : i + 1], matrix) for i in range(len(x))])

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, kv: Pass, rule: AttentionRule
    ) -> torch.Tensor:
        if not kv.decodes:
            return super().attention(q, k, v, layer, kv, rule)
        held, inputs = kv.pages[layer], kv.inputs(layer)
        _write(held.k, inputs.slots, k)
        _write(held.v, inputs.slots, v)
        keys, values = (
            read(half, inputs.table.flatten()).view(len(q), -1, *half.values.shape[2:]) for half in (held.k, held.v)
        )
        n_kv_heads, head_dim = keys.shape[2:]
        heads = q.view(len(q), n_kv_heads, -1, head_dim)
        scores = torch.einsum("nhgd,nphd->nhgp", heads, keys) * rule.scale
        positions, lengths = torch.arange(keys.shape[1]), inputs.lengths[:, None, None, None]
        hidden = (positions >= lengths) | (positions < lengths - (rule.window or len(positions)))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()  # a row that sees nothing: zeros
        return torch.einsum("nhgp,nphd->nhgd", weights, values.nan_to_num()).reshape(q.shape)


def _write(half: Half, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Rows of slot -1 go to a page that is thrown away."""
    values, scales = half.values, half.scales
    longer = Half(torch.cat([values, values[:1]]), None if scales is None else torch.cat([scales, scales[:1]]))
    write(longer, slots % (len(longer.values) * PAGE), rows)
    values.copy_(longer.values[:-1])
    if scales is not None and longer.scales is not None:
        scales.copy_(longer.scales[:-1])
