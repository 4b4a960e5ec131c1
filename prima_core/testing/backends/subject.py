"""What is checked, and what it is compared with: a backend's device, tiny models on it, the exact twin's answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.errors import ConfigError, ModelError
from prima_core.interfaces import Backend, Device, KvType, Layers, Shard, Slice, Step, Store
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.model.weights import Model
from prima_core.testing.driving import Visit, logits_of_all, step_of
from prima_core.testing.reference import exact_logits
from prima_core.testing.report import NotOffered, expect
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

FloatArray = NDArray[np.float32]

IDS: tuple[int, ...] = tuple((7 * i * i + 3 * i + 1) % 251 for i in range(128))
"""A text of normal tokens for every model of `examples.example`."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a backend's logits may be from the exact twin's: |a - b| / |b| of each row, in Euclidean norms.

    `logits`: with matrices of F32, F16 and BF16; `blocks`: with quantised ones (None: the same; where activations are
    rounded to int8 0.1 is usual). `f16` and `q8_0`: what keeping K and V in that type adds. `batch`: between a row
    alone and in company; 0: the same bits.
    """

    logits: float = 1e-4
    blocks: float | None = None
    f16: float = 5e-3
    q8_0: float = 0.06
    batch: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and not 0 <= limit < math.inf:
                raise ConfigError(f"the tolerance {field.name} is {limit}", hint="a number from 0 on")

    def of(self, tiny: TinyModel, kv_type: KvType = KvType.F32) -> float:
        return self.of_type("Q4_K" if tiny.types == "Q4_K_M" else tiny.types) + self._of_kv(kv_type)

    def of_type(self, type: str) -> float:
        in_blocks = BLOCKS[GGUFType[type]].n_weights > 1
        return self.blocks if in_blocks and self.blocks is not None else self.logits

    def _of_kv(self, kv_type: KvType) -> float:
        return {KvType.F32: 0.0, KvType.F16: self.f16, KvType.Q8_0: self.q8_0}[kv_type]


class Models:
    """Tiny models in a folder; each is written, opened and asked once. Close it when nothing is loaded any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[TinyModel, Model] = {}
        self._exact: dict[tuple[TinyModel, tuple[int, ...]], FloatArray] = {}

    def open(self, tiny: TinyModel) -> Model:
        if tiny not in self._open:
            path = self._folder / f"{len(self._open)}-{tiny.arch}-{tiny.types}.gguf"
            self._open[tiny] = open_model(write_tiny_model(path, tiny))
        return self._open[tiny]

    def exact(self, tiny: TinyModel, ids: Sequence[int]) -> FloatArray:
        """[len(ids), vocab_size]: the exact twin's logits after each token."""
        key = tiny, tuple(ids)
        if key not in self._exact:
            self._exact[key] = exact_logits(self.open(tiny).path, ids)
        return self._exact[key]

    def close(self) -> None:
        for model in self._open.values():
            model.close()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Shards that hold a model between them, in the order of its layers, driven as a ring drives them."""

    visits: tuple[Visit, ...]

    @property
    def shard(self) -> Shard:
        return self.visits[0][0]

    @property
    def layers(self) -> Layers:
        return self.visits[0][1]

    def logits(self, step: Step) -> FloatArray:
        """[n_tokens, vocab_size]"""
        return logits_of_all(self.visits, step)

    def greedy(self, step: Step, n: int) -> tuple[FloatArray, list[int]]:
        """`n` tokens after those of `step`, which has one chunk: the logits of all rows but the last token's, and the
        tokens."""
        [chunk], rows, ids = step.chunks, [self.logits(step)], list[int]()
        while True:
            ids.append(int(np.argmax(rows[-1][-1])))
            if len(ids) == n:
                return np.concatenate(rows), ids
            start = chunk.start + chunk.count + len(ids) - 1
            rows.append(self.logits(step_of(chunk.sequence, ids[-1:], start)))


@dataclass(frozen=True, slots=True)
class Subject:
    """A device of an open backend. All of it is used in the owner thread."""

    backend: Backend
    device: Device
    tolerance: Tolerance
    models: Models

    @contextmanager
    def part(self, tiny: TinyModel, part: Slice, store: Store | None = None) -> Iterator[Shard]:
        """A part of the model on the device, of the model's own store or another."""
        model = self.models.open(tiny)
        store = store or model.store()
        with ExitStack() as exits:
            exits.callback(store.close)
            shard = self.backend.load(model.spec, self.device.id, part, store)
            exits.callback(shard.close)
            yield shard

    @contextmanager
    def whole(self, tiny: TinyModel, kv_type: KvType = KvType.F32, store: Store | None = None) -> Iterator[Loaded]:
        layers = Layers(0, tiny.n_layers)
        with self.part(tiny, replace(WHOLE, layers=(layers,), kv_type=kv_type), store) as shard:
            yield Loaded(((shard, layers),))

    @contextmanager
    def offered(self, tiny: TinyModel, kv_type: KvType = KvType.F32, store: Store | None = None) -> Iterator[Loaded]:
        """As `whole`; raises NotOffered where the backend refuses the model."""
        with ExitStack() as exits:
            try:
                loaded = exits.enter_context(self.whole(tiny, kv_type, store))
            except ModelError as error:
                raise NotOffered(str(error)) from error
            yield loaded


WHOLE = Slice((), has_input=True, has_output=True)


def worst(rows: FloatArray, expected: FloatArray) -> float:
    """The largest |a - b| / |b| of a row; NaN where any value is."""
    if rows.shape != expected.shape:
        return float("nan")
    return float((np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)).max(initial=0))


def close_to_exact(rows: FloatArray, exact: FloatArray, limit: float, what: str, hint: str = "") -> float:
    """The error. Raises Wrong when it is beyond `limit`."""
    error = worst(rows, exact)
    expect(error <= limit, f"{what} within {limit:g} of the exact twin's", _described(rows, exact, error), hint)
    return error


def same_in_company(rows: FloatArray, alone: FloatArray, limit: float, what: str, hint: str = "") -> float | str:
    """How far rows are from what they are alone, or "bit-equal". Raises Wrong when it is beyond `limit`."""
    if rows.shape == alone.shape and np.array_equal(rows, alone):
        return "bit-equal"
    error = worst(rows, alone)
    claim = f"within {limit:g} of" if limit else "the bits of"
    expect(error <= limit, f"{what}: {claim} those alone", _described(rows, alone, error), hint or _BATCH)
    return error


_BATCH = "a row's result may not depend on the rows beside it; see Tolerance.batch"


def _described(rows: FloatArray, expected: FloatArray, error: float) -> str:
    if rows.shape != expected.shape:
        return f"shape {list(rows.shape)} instead of {list(expected.shape)}"
    if not np.isfinite(rows).all():
        return "values that are not finite"
    by_row = np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return f"an error of {error:.2g}, in row {int(by_row.argmax())} of {len(rows)}"
