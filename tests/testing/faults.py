"""Broken backends: numpy's, each with one fault that a real one could have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.blocks import BlocksInPlace
from prima_core.arch.families import family
from prima_core.arch.family import Block
from prima_core.arch.fused import Unfused
from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.arch.shard import OpsShard
from prima_core.errors import ConfigError, DeviceMemoryError, FrameError, ModelError
from prima_core.interfaces import (
    BackendOptions,
    BackendPlugin,
    Chunk,
    Device,
    KvKind,
    KvOp,
    KvType,
    Layers,
    Probe,
    Shard,
    Slice,
    Step,
    Store,
    Weight,
)
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec
from prima_numpy.backend import NumpyBackend
from prima_numpy.kernels import load_kernels
from prima_numpy.kv import NumpyKv, Pass, Room
from prima_numpy.ops import Matrix, NativeOps

FloatArray = NDArray[np.float32]
OneShard = OpsShard[FloatArray, Matrix, Pass]


class Faulty(NumpyBackend):
    """Sound; what is wrong is put into a subclass, its `ops`, their `kv` or its `shard`."""

    ops_class: type[Ops]
    shard_class: type[OneShard] = OpsShard

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(replace(options, threads=1))
        self._ops = self.ops_class()

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        return self.shard_class(self.ops(device), model, part, store)


class Ops(Unfused[FloatArray, Matrix, Pass], NativeOps):
    """Unfused, so that a fault of one operation shows wherever blocks use it."""

    kv_class: type[NumpyKv] = NumpyKv

    def __init__(self) -> None:
        kernels = load_kernels(1)
        assert kernels is not None
        NativeOps.__init__(self, kernels)
        Unfused.__init__(self, self)

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> NumpyKv:
        return self.kv_class(part.layers, n_kv_heads, head_dim, part.kv_type)


Faulty.ops_class = Ops


def with_ops(ops: type[Ops]) -> type[Faulty]:
    return type(f"With{ops.__name__}", (Faulty,), {"ops_class": ops})


def with_kv(kv: type[NumpyKv]) -> type[Faulty]:
    return with_ops(type(f"With{kv.__name__}", (Ops,), {"kv_class": kv}))


def with_shard(shard: type[OneShard]) -> type[Faulty]:
    return type(f"With{shard.__name__}", (Faulty,), {"shard_class": shard})


# ---------------------------------------------------------------- operations


class RotatesOtherPairs(Ops):
    def rope(self, x: FloatArray, rope: Rope[FloatArray]) -> FloatArray:
        other = RopeKind.NEOX if rope.kind == RopeKind.NORM else RopeKind.NORM
        return super().rope(x, replace(rope, kind=other))


class RotatesWholeHeads(Ops):
    """Where only a part of the head rotates."""

    def rope(self, x: FloatArray, rope: Rope[FloatArray]) -> FloatArray:
        missing = rope.head_dim // 2 - rope.cos.shape[1]
        cos = np.pad(rope.cos, ((0, 0), (0, missing)), mode="edge")
        sin = np.pad(rope.sin, ((0, 0), (0, missing)), mode="edge")
        return super().rope(x, replace(rope, cos=cos, sin=sin))


class DependsOnTheBatch(Ops):
    def linear(self, x: FloatArray, matrix: Matrix) -> FloatArray:
        return super().linear(x, matrix) * np.float32(1 + 1e-6 * len(x))


class CopiesNothing(Ops):
    """And says that it does."""

    copies = True


class RefillsNothing(CopiesNothing):
    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        return super().matrix(replace(weight, data=weight.data.copy()), bias)

    def refill(self, slot: Matrix, weight: Weight, bias: Weight | None = None) -> Matrix:
        return slot

    def settle(self, x: FloatArray) -> FloatArray:
        return x


class LosesLongChunks(Ops):
    """A kernel of blocks of 16 rows that forgets the last block."""

    def linear(self, x: FloatArray, matrix: Matrix) -> FloatArray:
        y = super().linear(x, matrix)
        if len(x) > 16:
            y[len(x) // 16 * 16 - 16 :] = 0
        return y


class MisreadsQ4K(Ops):
    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        if weight.type is GGUFType.Q4_K:
            data = weight.data.reshape(-1, 144).copy()
            data[:, [4, 5]] = data[:, [5, 4]]  # two scales of each block
            weight = replace(weight, data=data.reshape(-1))
        return super().matrix(weight, bias)


class RefusesQ4K(Ops):
    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        if weight.type is GGUFType.Q4_K:
            raise ModelError("Q4_K is not for this device", field=weight.name)
        return super().matrix(weight, bias)


class ForgetsBiases(Ops):
    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        return super().matrix(weight)


class SeesBeyondTheWindow(Ops):
    def attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, layer: int, kv: Pass, rule: AttentionRule
    ) -> FloatArray:
        return super().attention(q, k, v, layer, kv, replace(rule, window=0))


class TakesTheLastOfTies(Ops):
    def mixture(
        self, x: FloatArray, scores: FloatArray, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> FloatArray:
        later = scores + np.arange(scores.shape[1], dtype=np.float32) * np.float32(1e-6)
        return super().mixture(x, later, gate, up, down, rule)


class AddsInPlace(Ops):
    def add(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return np.add(x, y, out=x)


class ForgetsWhatItAddsTo(Ops):
    def added_linear(self, x: FloatArray, matrix: Matrix, to: FloatArray) -> FloatArray:
        return self.linear(x, matrix)


class ForgetsTheFusedNorm(Ops):
    def normed_linears(
        self, x: FloatArray, gain: FloatArray, eps: float, matrices: Sequence[Matrix]
    ) -> Sequence[FloatArray]:
        return self.linears(x, matrices)


class GivesItsBuffer(Ops):
    """What it hands out is where the next pass writes."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[tuple[int, ...], FloatArray] = {}

    def to_host(self, x: FloatArray) -> FloatArray:
        buffer = self._buffers.setdefault(x.shape, np.empty_like(x))
        buffer[...] = x
        return buffer


class OverflowsInGelu(Ops):
    def geglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            e = np.exp(np.float32(1.59576912) * (gate + np.float32(0.044715) * gate**3))
            product: FloatArray = gate * e / (e + 1) * up
        return product


# ---------------------------------------------------------------- KV


class Appends(NumpyKv):
    """K and V go behind what is there, whatever position the chunk says."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        at = super().begin(layers, step)
        first = self._rooms[layers.start]
        spans = tuple((a, b, replace(c, start=_end(first[c.sequence], c))) for a, b, c in at.spans)
        return replace(at, spans=spans)


def _end(room: Room, chunk: Chunk) -> int:
    return max(min(room.length, room.capacity - chunk.count), chunk.start)


class ForgetsDrops(NumpyKv):
    def begin(self, layers: Layers, step: Step) -> Pass:
        return super().begin(layers, replace(step, kv=tuple(op for op in step.kv if op.kind is not KvKind.DROP)))


class DropsOnce(NumpyKv):
    """A drop of what is not there is refused."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        known = set(self._rooms[layers.start])
        for op in step.kv:
            if op.kind is KvKind.DROP and op.sequence not in known:
                raise FrameError(f"sequence {op.sequence} is unknown")
            known ^= {op.sequence} if op.kind in (KvKind.OPEN, KvKind.DROP) else set()
        return super().begin(layers, step)


class AppliesByHalves(NumpyKv):
    def begin(self, layers: Layers, step: Step) -> Pass:
        for operation in step.kv:
            super().begin(layers, Step((), (operation,)))
        return super().begin(layers, replace(step, kv=()))


class RaisesKeyErrors(NumpyKv):
    def begin(self, layers: Layers, step: Step) -> Pass:
        try:
            return super().begin(layers, step)
        except FrameError as error:
            raise KeyError(str(error)) from error


class IgnoresGaps(NumpyKv):
    def begin(self, layers: Layers, step: Step) -> Pass:
        for layer in layers:
            for chunk in step.chunks:
                room = self._rooms[layer].get(chunk.sequence)
                if room is not None:
                    room.length = max(room.length, min(chunk.start, room.capacity))
        return super().begin(layers, step)


class SharesForks(NumpyKv):
    """A fork of the same capacity is the same memory, and nothing is copied when one of both is written."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        at = super().begin(layers, step)
        for op in step.kv:
            for layer in layers if op.kind is KvKind.FORK else ():
                source, room = self._rooms[layer][op.source], self._rooms[layer][op.sequence]
                if source.capacity == room.capacity:
                    room.k, room.v = source.k, source.v
        return at


class ShortensEverywhere(NumpyKv):
    """At once in all layers, also those that the step has not come to."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        for op in step.kv if layers.start == 0 else ():
            if op.kind is KvKind.MOVE and op.source == op.sequence:
                for rooms in self._rooms.values():
                    if op.sequence in rooms:
                        rooms[op.sequence].length = min(op.length, rooms[op.sequence].length)
        return super().begin(layers, step)


class KeepsTheCapacity(NumpyKv):
    """A move is a new name, not a new room."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        rooms = self._rooms[layers.start]
        kept = [self._kept(op, rooms) for op in step.kv]
        return super().begin(layers, replace(step, kv=tuple(kept)))

    def _kept(self, op: KvOp, rooms: Mapping[int, Room]) -> KvOp:
        is_known = op.kind is KvKind.MOVE and op.source in rooms
        return replace(op, capacity=rooms[op.source].capacity) if is_known else op


class LosesWhatItCopies(NumpyKv):
    """A fork copies whole pages of 64 positions."""

    def begin(self, layers: Layers, step: Step) -> Pass:
        at = super().begin(layers, step)
        for op in step.kv:
            for layer in layers if op.kind is KvKind.FORK else ():
                room, whole = self._rooms[layer][op.sequence], op.length // 64 * 64
                room.k[:, whole : op.length] = 0
        return at


# ---------------------------------------------------------------- shards


class WritesToItsInput(OneShard):
    def run(self, layers: Layers, activation: FloatArray, step: Step) -> FloatArray:
        after = super().run(layers, activation, step)
        if activation.flags.writeable:
            activation[...] = after
        return after


class WantsToWriteItsInput(OneShard):
    def run(self, layers: Layers, activation: FloatArray, step: Step) -> FloatArray:
        activation *= 1
        return super().run(layers, activation, step)


class GivesFloat64(OneShard):
    def logits(self, activation: FloatArray, rows: Sequence[int]) -> FloatArray:
        return super().logits(activation, rows).astype(np.float64)


class SortsRows(OneShard):
    def logits(self, activation: FloatArray, rows: Sequence[int]) -> FloatArray:
        return super().logits(activation, sorted(rows))


class TakesAnyToken(OneShard):
    def embed(self, step: Step) -> FloatArray:
        n = self._model.vocab_size
        return super().embed(replace(step, tokens=tuple(token % n for token in step.tokens)))


class TakesAnyShape(OneShard):
    def _check_activation(self, activation: FloatArray, n_rows: int) -> None:
        pass


class CountsLayersFromItsOwnFirst(OneShard):
    """Windows and ropes by the place in the shard, not in the model."""

    def __init__(self, ops: Ops, model: ModelSpec, part: Slice, store: Store) -> None:
        self._first = min((layers.start for layers in part.layers), default=0)
        super().__init__(ops, model, part, store)

    def compute(self, layers: Layers, x: FloatArray, ropes: Mapping[Any, Rope[FloatArray]], kv: Pass) -> FloatArray:
        plain = self._model.rope
        shifted = {rope: ropes[plain] if self._first else ropes[rope] for rope in ropes}
        return super().compute(layers, x, shifted, kv)


class BindsOnce(OneShard):
    """Wherever the store says that a layer's tensors lie now."""

    class Blocks(BlocksInPlace[FloatArray, Matrix, Pass]):
        def _block(self, layer: int, weights: Mapping[str, Weight]) -> Block[FloatArray, Pass]:
            if layer not in self._bound:
                self._bound[layer] = weights, self._bind(self._ops, layer, weights)
            return self._bound[layer][1]

    def __init__(self, ops: Ops, model: ModelSpec, part: Slice, store: Store) -> None:
        super().__init__(ops, model, part, store)
        block = family(model.arch).block
        self.blocks = self.Blocks(ops, lambda binder, *rest: block(ops, binder, model, *rest), store)


class KeepsLayers(OneShard):
    """As if it were to be used for ever."""

    def __init__(self, ops: Ops, model: ModelSpec, part: Slice, store: Store) -> None:
        super().__init__(ops, model, part, store)
        store.release = lambda layer: None  # type: ignore[method-assign]


class LivesAfterClose(OneShard):
    def close(self) -> None:
        pass


class ClosesOnce(OneShard):
    def close(self) -> None:
        if not self._part.layers and not self._part.has_output and not self._part.has_input:
            raise RuntimeError("it is closed")
        super().close()


class HasAllParts(OneShard):
    """Both ends on every shard."""

    def __init__(self, ops: Ops, model: ModelSpec, part: Slice, store: Store) -> None:
        super().__init__(ops, model, replace(part, has_input=True, has_output=True), store)


class SkipsAnEmptyStep(OneShard):
    """Nothing to compute, nothing to do: the step's KV operations are lost."""

    def run(self, layers: Layers, activation: FloatArray, step: Step) -> FloatArray:
        return super().run(layers, activation, step) if step.chunks else activation


# ---------------------------------------------------------------- backends


class TakesAnyKernels(Faulty):
    def __init__(self, options: BackendOptions) -> None:
        super().__init__(replace(options, kernels="auto"))


class NamesNoBackend(Faulty):
    def devices(self) -> Sequence[Device]:
        return [Device("cpu", 1 << 30)]


class HasNoMemory(Faulty):
    def devices(self) -> Sequence[Device]:
        return [Device("numpy:cpu", 0)]


class GrowsUnknownTypes(Faulty):
    def devices(self) -> Sequence[Device]:
        return [Device("numpy:cpu", 1 << 30, growth={"q4_k": 1.5})]


class TakesAnyDevice(Faulty):
    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        return super().load(model, "numpy:cpu", part, store)


class CountsNoKv(Faulty):
    """A device with memory of its own that promises any room."""

    def devices(self) -> Sequence[Device]:
        return [Device("numpy:cpu", 1 << 30, shares_host=False)]


class MiscountsWhatFits(Faulty):
    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        if part.kv_tokens:
            raise DeviceMemoryError("2 layers need 0.4 MB on numpy:cpu, which has 0.4 MB: 1 of the layers would fit")
        return super().load(model, device, part, store)


class LacksFloat16Kv(Faulty):
    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        if part.kv_type is KvType.F16:
            raise ModelError("K and V are kept in f32 only")
        return super().load(model, device, part, store)


class DescribesByNumbers(Faulty):
    def describe(self) -> Mapping[str, str]:
        return {"threads": 1}  # type: ignore[dict-item]  # the fault


class CannotOpen(Faulty):
    def __init__(self, options: BackendOptions) -> None:
        if options.kernels != "auto":
            raise ConfigError(f"kernels {options.kernels!r} are unknown")
        raise OSError("libdevice.so is missing")


def usable() -> Probe:
    return Probe(usable=True)


def raising() -> Probe:
    raise ImportError("libdevice.so is missing")


def speechless() -> Probe:
    return Probe(usable=False)


def plugin(
    backend: Callable[[BackendOptions], NumpyBackend] = Faulty,
    name: str = "numpy",
    api: int = 1,
    probe: Callable[[], Probe] = usable,
) -> BackendPlugin:
    return BackendPlugin(name, api, probe, backend)
