"""Whether logits are right: every tensor type, every family, batches of all sizes, any cut of the layers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from prima_core.interfaces import KvType, Layers, Shard, Slice, Step
from prima_core.testing.backends.subject import (
    IDS,
    FloatArray,
    Loaded,
    Subject,
    close_to_exact,
    same_in_company,
)
from prima_core.testing.driving import joined, opened, step_of
from prima_core.testing.examples import example
from prima_core.testing.report import Figures, expect
from prima_core.testing.tinymodel import Arch, MatrixType, TinyModel

N_GREEDY = 6
_ROUNDS = "a backend that rounds (activations to int8, K and V) says how much that costs: see Tolerance"
BATCHES = (1, 2, 7, 64)
BATCH_MODEL = example("llama", "Q8_0")


def check_type(subject: Subject, type: MatrixType) -> Figures:
    """A mixture of experts whose matrices are all of the type.

    All experts are used: rounded activations may choose others, and then nothing can be compared.
    """
    return against_exact(subject, replace(example("mixtral", type), n_experts=3, n_experts_used=3), n_prompt=20)


def check_family(subject: Subject, arch: Arch) -> Figures:
    """In float32, beyond the family's windows."""
    return against_exact(subject, example(arch), n_prompt=70)


def against_exact(subject: Subject, tiny: TinyModel, n_prompt: int, kv_type: KvType = KvType.F32) -> Figures:
    """A prompt as one chunk, then greedy decoding; then the same text as one chunk."""
    prompt, limit = IDS[:n_prompt], subject.tolerance.of(tiny, kv_type)
    with subject.offered(tiny, kv_type) as model:
        rows, ids = model.greedy(step_of(0, prompt, kv=[opened(0, n_prompt + N_GREEDY)]), N_GREEDY)
        text = [*prompt, *ids[:-1]]
        at_once = model.logits(step_of(1, text, kv=[opened(1, len(text))]))
    exact = subject.models.exact(tiny, text)
    error = close_to_exact(rows, exact, limit, "logits", _ROUNDS)
    _check_greedy(ids, exact[n_prompt - 1 :], limit)
    batch = same_in_company(at_once, rows, subject.tolerance.batch, "decoded tokens once more as one chunk")
    return {"error": error, "greedy": f"{len(ids)} of {len(ids)}", "batch": batch}


def _check_greedy(ids: list[int], exact: FloatArray, limit: float) -> None:
    """Each token is the exact twin's, or so nearly as likely that the tolerance decides."""
    for index, (token, row) in enumerate(zip(ids, exact, strict=True)):
        tie = 4 * limit * float(np.sqrt(np.mean(row**2)))
        behind = float(row.max() - row[token])
        expect(
            behind <= tie,
            f"greedy token {index} to be {int(row.argmax())}, as the exact twin says",
            f"{token}, whose exact logit is {behind:.2g} lower (a tie would be {tie:.2g})",
        )


# ---------------------------------------------------------------- batches


def check_chunk(subject: Subject, n: int) -> Figures:
    """`n` tokens as one chunk, against the exact twin and against one token after the other."""
    with subject.whole(BATCH_MODEL) as model:
        rows = model.logits(step_of(0, IDS[:n], kv=[opened(0, n)]))
        alone = _one_by_one(model, sequence=1, n=n)
    error = close_to_exact(rows, subject.models.exact(BATCH_MODEL, IDS[:n]), _limit(subject), "logits")
    return {"error": error, "batch": same_in_company(rows, alone, subject.tolerance.batch, f"{n} rows of a chunk")}


def check_company(subject: Subject, n: int) -> Figures:
    """One token of each of `n` sequences of several lengths, after their beginnings went together as well."""
    texts = [IDS[5 * i : 5 * i + 3 + i] for i in range(5)]
    with subject.whole(BATCH_MODEL) as model:
        model.logits(joined(*(step_of(i, texts[i % 5][:-1], kv=[opened(i, 9)]) for i in range(n))))
        last = [step_of(i, texts[i % 5][-1:], len(texts[i % 5]) - 1) for i in range(n)]
        rows = model.logits(joined(*last))
        alone = [_last_row(model, n + i, text) for i, text in enumerate(texts)]
    exact = [subject.models.exact(BATCH_MODEL, text)[-1:] for text in texts]
    error = close_to_exact(rows, _cycled(exact, n), _limit(subject), f"logits of {n} sequences")
    what = f"rows of {n} sequences"
    return {"error": error, "batch": same_in_company(rows, _cycled(alone, n), subject.tolerance.batch, what)}


def _limit(subject: Subject) -> float:
    return subject.tolerance.of(BATCH_MODEL)


def _one_by_one(model: Loaded, sequence: int, n: int) -> FloatArray:
    steps = [step_of(sequence, IDS[i : i + 1], i, [opened(sequence, n)] if i == 0 else []) for i in range(n)]
    return np.concatenate([model.logits(step) for step in steps])


def _last_row(model: Loaded, sequence: int, text: tuple[int, ...]) -> FloatArray:
    model.logits(step_of(sequence, text[:-1], kv=[opened(sequence, len(text))]))
    return model.logits(step_of(sequence, text[-1:], len(text) - 1))


def _cycled(rows: list[FloatArray], n: int) -> FloatArray:
    return np.concatenate([rows[i % len(rows)] for i in range(n)])


# ---------------------------------------------------------------- cuts


CUT_MODEL = replace(example("gemma3"), d_model=64, d_ff=64)  # windows and ropes by layer


@dataclass(frozen=True, slots=True)
class Cut:
    """Which shard runs which layers, in order. The first shard has the input part, the last one the output part."""

    name: str
    n_shards: int
    visits: tuple[tuple[int, Layers], ...]

    def part(self, shard: int) -> Slice:
        ranges = tuple(layers for owner, layers in self.visits if owner == shard)
        return Slice(ranges, shard == 0, shard == self.n_shards - 1, KvType.F32)


CUTS = (
    Cut("one shard", 1, ((0, Layers(0, 1)), (0, Layers(1, 5)), (0, Layers(5, 7)))),
    Cut("two shards", 2, ((0, Layers(0, 4)), (1, Layers(4, 7)))),
    Cut("two by turns", 2, ((0, Layers(0, 1)), (1, Layers(1, 3)), (0, Layers(3, 6)), (1, Layers(6, 7)))),
    Cut("ends without layers", 4, ((1, Layers(0, 6)), (2, Layers(6, 7)))),
)


def check_cut(subject: Subject, cut: Cut) -> Figures:
    """Chained shards, with several ranges each, give what one shard gives."""
    steps = [step_of(0, IDS[:30], kv=[opened(0, 40)]), *(step_of(0, IDS[i : i + 1], i) for i in range(30, 33))]
    with subject.whole(CUT_MODEL) as model:
        uncut = np.concatenate([model.logits(step) for step in steps])
    with ExitStack() as exits:
        shards = [exits.enter_context(subject.part(CUT_MODEL, cut.part(i))) for i in range(cut.n_shards)]
        rows = np.concatenate([_passed(shards, cut, step) for step in steps])
    limit = subject.tolerance.of(CUT_MODEL)
    hint = "layers go by their numbers in the model (windows, ropes), not by their place in the shard"
    error = close_to_exact(rows, subject.models.exact(CUT_MODEL, IDS[:33]), limit, "logits of chained shards", hint)
    return {"error": error, "batch": same_in_company(rows, uncut, subject.tolerance.batch, "chained shards", hint)}


def _passed(shards: list[Shard], cut: Cut, step: Step) -> FloatArray:
    x = shards[0].embed(step)
    for index, layers in cut.visits:
        x = shards[index].run(layers, x, step)
    return shards[-1].logits(x, range(step.n_tokens))
