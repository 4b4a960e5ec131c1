"""What rounding costs: the built-in model in every tensor type, by the native kernels and by the exact twin.

    python -m bench.accuracy [--types Q4_K Q8_0] [--json FILE]

Its matrices are quantised to each type in turn. Then the same blocks are computed with twice: by the native kernels,
which round activations to int8 and keep K and V in f16, and by the exact twin, which does neither. The text is held
out: the questions of tests/builtin/rewordings.toml, and chats that the generator in training/ makes of a seed that no
training batch had. Says of the logits how near they are (cosine: mean and least of all positions), how often the
likeliest token is the same, and the perplexity of both. Fails where a CPU variant gives other bits than the best one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.accuracy_quantise import quantised
from bench.accuracy_text import held_out
from bench.memory_store import MemoryStore, whole
from prima_core.arch.families import open_model
from prima_core.arch.shard import OpsShard
from prima_core.commands.setup import model_path
from prima_core.commands.table import wide_console
from prima_core.interfaces import KvKind, KvOp, KvType, Layers, Shard, Step, Weight
from prima_core.model.quant import GGUFType
from prima_core.model.spec import ModelSpec
from prima_core.model.tokenizer import Tokenizer
from prima_core.model.weights import Model
from prima_core.testing.driving import joined, logits_of_all, opened, step_of
from prima_numpy.kernels import Kernels
from prima_numpy.ops import NativeOps, ReferenceOps, exact_product
from prima_numpy.quant import dequantize

FloatArray = NDArray[np.float32]
Text = Sequence[int]

STEP_TOKENS = 512
"""Of texts that go through together: the exact twin dequantises all weights at each step."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of logits beside the exact twin's."""

    cosine_mean: float
    cosine_least: float
    same_greedy_share: float
    perplexity: float
    perplexity_exact: float


@dataclass(frozen=True, slots=True)
class TypeAccuracy:
    """`other_variants`: the CPU variants whose bits are others than those of the best one."""

    type: str
    accuracy: Accuracy
    other_variants: tuple[str, ...]


def main() -> int:
    options = parse(sys.argv[1:])
    types = [GGUFType[name] for name in options.types]
    table = Table("type", "cosine, mean", "least", "same greedy token", "perplexity", "exact", "variants")
    with model_path(None) as path, open_model(path) as model:
        texts = held_out(Tokenizer.from_metadata(model.file.metadata))
        rows = track(
            accuracies(model, types, texts), "computing", len(types), console=Console(stderr=True), transient=True
        )
        found = list(rows)
    for row in found:
        table.add_row(*shown(row))
    n_tokens = sum(map(len, texts))
    print(f"{model.name}, {n_tokens} tokens of held-out text; variants: {', '.join(Kernels.variants())}")
    wide_console().print(table)
    if options.json:
        report: dict[str, Any] = {"model": model.name, "n_tokens": n_tokens, "variants": Kernels.variants()}
        report["types"] = [
            {"type": row.type, **asdict(row.accuracy), "other_variants": row.other_variants} for row in found
        ]
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(row.other_variants for row in found))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [type.name for type in GGUFType]
    parser.add_argument("--types", nargs="+", choices=names, default=names, metavar="TYPE", help=", ".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    return parser.parse_args(arguments)


def shown(row: TypeAccuracy) -> Iterator[str]:
    accuracy = row.accuracy
    yield row.type
    yield from (f"{cosine:.6f}" for cosine in (accuracy.cosine_mean, accuracy.cosine_least))
    yield f"{accuracy.same_greedy_share:.2%}"
    yield from (f"{perplexity:.4f}" for perplexity in (accuracy.perplexity, accuracy.perplexity_exact))
    yield f"DIFFERENT: {', '.join(row.other_variants)}" if row.other_variants else "same bits"


# ---------------------------------------------------------------- what is compared


def accuracies(model: Model, types: Iterable[GGUFType], texts: Sequence[Text]) -> Iterator[TypeAccuracy]:
    best, *others = Kernels.variants()
    first = next(_batches(texts))
    for type in types:
        store = requantised(model, type)
        native = logits(model, store, best, texts)
        right = logits(model, store, None, texts)
        other = [name for name in others if any(map(differ, native, logits(model, store, name, first)))]
        yield TypeAccuracy(type.name, compared(native, right, texts), tuple(other))


def requantised(model: Model, type: GGUFType) -> MemoryStore:
    """The model's weights with all matrices in `type`."""
    store = model.store()
    layers = [store.views(layer) for layer in range(model.spec.n_layers)]
    *new, ends = ({name: _in_type(weight, type) for name, weight in part.items()} for part in (*layers, store.shared()))
    return MemoryStore(tuple(new), ends)


def _in_type(weight: Weight, type: GGUFType) -> Weight:
    if len(weight.shape) == 1:
        return weight
    values = dequantize(weight.type, weight.data, weight.shape)
    return Weight(weight.name, type, weight.shape, quantised(type, values))


def logits(model: Model, store: MemoryStore, variant: str | None, texts: Sequence[Text]) -> list[FloatArray]:
    """[ids, vocab_size] of each text; by the exact twin where `variant` is None."""
    ops = ReferenceOps(exact_product, KvType.F32) if variant is None else NativeOps(Kernels(variant=variant))
    shard: Shard = OpsShard(ops, model.spec, whole(model.spec), store)
    try:
        return list(chain.from_iterable(_together(shard, model.spec, some) for some in _batches(texts)))
    finally:
        shard.close()


def _batches(texts: Sequence[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > STEP_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def _together(shard: Shard, spec: ModelSpec, texts: Sequence[Text]) -> Iterator[FloatArray]:
    layers = Layers(0, spec.n_layers)
    steps = [step_of(i, text, kv=[opened(i, len(text))]) for i, text in enumerate(texts)]
    found = logits_of_all([(shard, layers)], joined(*steps))
    shard.run(layers, np.empty((0, spec.d_model), np.float32), _dropped(len(texts)))
    ends = np.cumsum([len(text) for text in texts])
    yield from np.split(found, ends[:-1])


def _dropped(n: int) -> Step:
    return Step((), tuple(KvOp(KvKind.DROP, sequence) for sequence in range(n)))


def differ(one: FloatArray, other: FloatArray) -> bool:
    return one.tobytes() != other.tobytes()


def compared(native: Sequence[FloatArray], right: Sequence[FloatArray], texts: Sequence[Text]) -> Accuracy:
    """Logits [ids, vocab_size] of each text."""
    a, b = np.concatenate(native).astype(np.float64), np.concatenate(right).astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    same = float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    return Accuracy(
        float(cosines.mean()), float(cosines.min()), same, perplexity(native, texts), perplexity(right, texts)
    )


def perplexity(logits: Sequence[FloatArray], texts: Sequence[Text]) -> float:
    """Of all ids but the first of each text."""
    surprises = [_surprises(own[:-1], text[1:]) for own, text in zip(logits, texts, strict=True)]
    return float(np.exp(np.concatenate(surprises).mean()))


def _surprises(logits: FloatArray, ids: Text) -> NDArray[np.float64]:
    """-log of the probability of each of `ids`."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    surprises: NDArray[np.float64] = total - wide[np.arange(len(ids)), list(ids)]
    return surprises


if __name__ == "__main__":
    sys.exit(main())
