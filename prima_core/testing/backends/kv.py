"""Whether K and V are kept as steps say: scenarios of texts, each logit compared with the exact twin's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from prima_core.errors import DeviceMemoryError, FrameError, PrimaError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_core.testing.backends.numbers import against_exact
from prima_core.testing.backends.subject import IDS, FloatArray, Loaded, Subject, close_to_exact
from prima_core.testing.driving import opened, pass_through
from prima_core.testing.report import Figures, NotOffered, Wrong, expect_refusal
from prima_core.testing.tinymodel import TinyModel

KV_MODEL = TinyModel(d_model=64, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=64, vocab_size=280, seed=52)
LAYERS = Layers(0, 1), Layers(1, 2)
OTHER = tuple(reversed(IDS))


@dataclass(frozen=True, slots=True)
class Say:
    """Tokens of a sequence, at the end of its text or from position `at` on."""

    sequence: int
    ids: Sequence[int]
    at: int | None = None


class Texts:
    """What each sequence should hold by now. A step is compared as soon as it has run.

    The model's two layers are two visits, so that operations on KV come once for each.
    """

    def __init__(self, subject: Subject, model: Loaded, kv_type: KvType) -> None:
        self._models, self._limit = subject.models, subject.tolerance.of(KV_MODEL, kv_type)
        self.model = model
        self.error = 0.0
        self._texts: dict[int, list[int]] = {}

    def run(self, *says: Say, kv: Sequence[KvOp] = ()) -> None:
        step = self.step(*says, kv=kv)
        x = pass_through(self.model.visits, step)
        if says:
            self.compare(step, self.model.shard.logits(x, range(step.n_tokens)), self.expected(step))

    def step(self, *says: Say, kv: Sequence[KvOp] = ()) -> Step:
        """The step, from now on a part of the texts."""
        for operation in kv:
            self._apply(operation)
        return Step(
            tuple(self._write(say) for say in says), tuple(kv), tuple(token for say in says for token in say.ids)
        )

    def expected(self, step: Step) -> FloatArray:
        """The exact logits of a step that was the last to be taken in."""
        return np.concatenate(
            [
                self._models.exact(KV_MODEL, self._texts[chunk.sequence][: chunk.start + chunk.count])[chunk.start :]
                for chunk in step.chunks
            ]
        )

    def compare(self, step: Step, rows: FloatArray, expected: FloatArray) -> None:
        what = f"logits of {_described(step)}"
        self.error = max(self.error, close_to_exact(rows, expected, self._limit, what))

    def refused(self, what: str, *says: Say, kv: Sequence[KvOp] = ()) -> None:
        """A step that raises FrameError and leaves everything as it was."""
        chunks = tuple(Chunk(say.sequence, self._start(say), len(say.ids)) for say in says)
        step = Step(chunks, tuple(kv), tuple(token for say in says for token in say.ids))
        expect_refusal(FrameError, what, lambda: pass_through(self.model.visits, step))

    def _start(self, say: Say) -> int:
        return len(self._texts.get(say.sequence, ())) if say.at is None else say.at

    def _write(self, say: Say) -> Chunk:
        start = self._start(say)
        self._texts[say.sequence][start:] = say.ids
        return Chunk(say.sequence, start, len(say.ids))

    def _apply(self, operation: KvOp) -> None:
        texts, sequence = self._texts, operation.sequence
        match operation.kind:
            case KvKind.OPEN:
                texts[sequence] = []
            case KvKind.FORK:
                texts[sequence] = texts[operation.source][: operation.length]
            case KvKind.MOVE:
                texts[sequence] = texts.pop(operation.source)[: operation.length]
            case KvKind.DROP:
                texts.pop(sequence, None)


def _described(step: Step) -> str:
    chunks = [f"positions {c.start} to {c.start + c.count - 1} of sequence {c.sequence}" for c in step.chunks]
    changes = [f"{op.kind} {op.sequence}" for op in step.kv]
    return " and ".join(chunks) + (f" after {', '.join(changes)}" if changes else "")


# ---------------------------------------------------------------- scenarios


def opens(texts: Texts) -> None:
    """Two sequences with their own rooms, by turns and together; one is filled to its capacity."""
    texts.run(Say(3, IDS[:66]), kv=[opened(3, 70)])
    texts.run(Say(8, OTHER[:5]), kv=[opened(8, 9)])
    texts.run(Say(8, OTHER[5:8]), Say(3, IDS[66:67]))
    texts.run(Say(3, IDS[67:70]), Say(8, OTHER[8:9]))


def opens_by_themselves(texts: Texts) -> None:
    """Steps without tokens change KV too."""
    texts.run(kv=[opened(1, 8), opened(2, 8)])
    texts.run(Say(1, IDS[:4]))
    texts.run(kv=[shortened(1, 2, 8), dropped(2)])
    texts.run(Say(1, OTHER[:3]))


def forks(texts: Texts) -> None:
    """Within a run of positions and at its end; the source goes on, in the same step too."""
    texts.run(Say(0, IDS[:75]), kv=[opened(0, 100)])
    texts.run(Say(1, OTHER[:3]), Say(0, IDS[75:77]), kv=[KvOp(KvKind.FORK, 1, 70, 90, source=0)])
    texts.run(Say(2, OTHER[5:6]), kv=[KvOp(KvKind.FORK, 2, 64, 65, source=0)])
    texts.run(Say(3, OTHER[7:9]), kv=[KvOp(KvKind.FORK, 3, 0, 8, source=0)])
    texts.run(Say(0, IDS[77:78]), Say(1, OTHER[3:4]), Say(3, OTHER[9:10]))


def forks_stay_apart(texts: Texts) -> None:
    """Source and fork may be written again at positions that they shared."""
    texts.run(Say(0, IDS[:40]), kv=[opened(0, 60)])
    texts.run(Say(1, OTHER[:2]), kv=[KvOp(KvKind.FORK, 1, 40, 60, source=0)])
    texts.run(Say(0, OTHER[:10], at=20), kv=[shortened(0, 20, 60)])
    texts.run(Say(1, OTHER[2:4]))
    texts.run(Say(1, OTHER[:5], at=30), Say(0, OTHER[10:12]), kv=[shortened(1, 30, 60)])
    texts.run(Say(0, IDS[3:5]), kv=[dropped(1)])


def moves(texts: Texts) -> None:
    """To another number and back, into more and into less room; the source is gone."""
    texts.run(Say(0, IDS[:70]), kv=[opened(0, 70)])
    texts.run(Say(5, IDS[70:72]), kv=[KvOp(KvKind.MOVE, 5, 70, 90, source=0)])
    texts.refused("a token of a sequence that was moved away", Say(0, IDS[:1], at=70))
    texts.run(Say(5, OTHER[:3]), kv=[KvOp(KvKind.MOVE, 5, 66, 69, source=5)])
    texts.refused("a token beyond the smaller capacity", Say(5, IDS[:1], at=69))
    texts.run(Say(0, OTHER[:2]), kv=[KvOp(KvKind.MOVE, 0, 60, 69, source=5)])
    texts.run(Say(5, OTHER[:2]), Say(0, OTHER[2:3]), kv=[opened(5, 4)])


def shortens(texts: Texts) -> None:
    """By a move to itself."""
    texts.run(Say(0, IDS[:70]), kv=[opened(0, 80)])
    texts.run(Say(0, OTHER[:4]), kv=[shortened(0, 65, 80)])
    texts.run(Say(0, OTHER[4:6]), kv=[shortened(0, 69, 80)])  # as long as it is: nothing to forget
    texts.run(Say(0, OTHER[6:7]), kv=[shortened(0, 3, 80)])
    texts.run(Say(0, OTHER[7:9]), kv=[shortened(0, 0, 80)])


def drops(texts: Texts) -> None:
    """Also what is not there; and in one step with a new begin under the same number."""
    texts.run(Say(0, IDS[:20]), kv=[dropped(0), opened(0, 30), dropped(7)])
    texts.run(Say(1, IDS[:2]), kv=[opened(1, 8)])
    texts.run(Say(0, OTHER[:6]), kv=[dropped(0), opened(0, 12)])
    texts.run(kv=[dropped(0)])
    texts.refused("a token of a sequence that was dropped", Say(0, IDS[:1], at=6))
    texts.run(Say(1, IDS[2:4]), kv=[dropped(0), dropped(0)])
    texts.run(Say(0, IDS[:1]), kv=[opened(0, 1)])


def rewrites(texts: Texts) -> None:
    """K and V are written where the chunk says, not behind what is there."""
    texts.run(Say(0, IDS[:70]), kv=[opened(0, 80)])
    texts.run(Say(0, OTHER[:5], at=62))
    texts.run(Say(0, OTHER[5:6]))
    texts.run(Say(0, IDS[62:64], at=66))
    texts.run(Say(0, OTHER[:1], at=0))
    texts.run(Say(0, OTHER[1:30]))


def refuses_and_lives(texts: Texts) -> None:
    """A refused step changes nothing: neither by the operations and chunks before the wrong one, nor after it."""
    texts.run(Say(0, IDS[:20]), Say(1, IDS[:3]), kv=[opened(0, 24), opened(1, 8)])
    right = [dropped(1), shortened(0, 5, 24), opened(4, 8)]
    texts.refused("a fork of an unknown sequence", kv=[*right, KvOp(KvKind.FORK, 2, 1, 8, source=99)])
    texts.refused("a move of an unknown sequence", kv=[*right, KvOp(KvKind.MOVE, 2, 1, 8, source=99)])
    texts.refused("a fork longer than its source", kv=[KvOp(KvKind.FORK, 2, 21, 30, source=0)])
    texts.refused("a fork longer than its room", kv=[KvOp(KvKind.FORK, 2, 9, 8, source=0)])
    texts.refused("a token of an unknown sequence", Say(0, OTHER[:3], at=10), Say(99, IDS[:1]), kv=[dropped(1)])
    texts.refused("tokens beyond the capacity", Say(1, OTHER[:2], at=0), Say(0, IDS[:5]))
    texts.refused("tokens that leave a gap", Say(1, OTHER[:2], at=0), Say(0, IDS[:2], at=21))
    texts.run(Say(0, IDS[20:22]), Say(1, IDS[3:5]))
    texts.run(Say(4, IDS[:8]), Say(2, IDS[:1]), kv=[opened(4, 8), opened(2, 1)])


def in_flight(texts: Texts) -> None:
    """A step's operations wait for its visit: the step before it has not been in the later layers yet."""
    texts.run(Say(0, IDS[:10]), Say(1, IDS[:6]), kv=[opened(0, 30), opened(1, 10)])
    steps, expected = [], []
    for says, kv in (
        ((Say(0, IDS[10:13]), Say(1, IDS[6:7])), ()),
        ((Say(0, OTHER[:3]), Say(1, OTHER[:2])), (shortened(0, 8, 30), dropped(1), opened(1, 5))),
        ((Say(2, OTHER[3:6]),), (KvOp(KvKind.MOVE, 2, 9, 30, source=0), dropped(1))),
    ):
        steps.append(texts.step(*says, kv=kv))
        expected.append(texts.expected(steps[-1]))
    shard = texts.model.shard
    states = [shard.embed(step) for step in steps]
    for layers in LAYERS:
        states = [shard.run(layers, x, step) for x, step in zip(states, steps, strict=True)]
    for step, x, exact in zip(steps, states, expected, strict=True):
        texts.compare(step, shard.logits(x, range(step.n_tokens)), exact)


def absurd_capacity(texts: Texts) -> None:
    """More positions than any memory has: DeviceMemoryError, unless room is taken as it fills; nothing has changed."""
    texts.run(Say(0, IDS[:5]), kv=[opened(0, 8)])
    try:
        pass_through(texts.model.visits, Step((), (dropped(0), opened(1, 1 << 48))))
    except DeviceMemoryError:
        texts.run(Say(0, IDS[5:7]))
        texts.run(Say(1, IDS[:2]), kv=[opened(1, 2)])
    except PrimaError as error:
        raise Wrong("DeviceMemoryError for 2^48 positions", f"{type(error).__name__}: {error}") from error


SCENARIOS: Mapping[str, Callable[[Texts], None]] = {
    "open": opens,
    "steps without tokens": opens_by_themselves,
    "fork": forks,
    "forks stay apart": forks_stay_apart,
    "move": moves,
    "a move to itself": shortens,
    "drop": drops,
    "positions are rewritten": rewrites,
    "a refused step changes nothing": refuses_and_lives,
    "steps in flight": in_flight,
    "an absurd capacity": absurd_capacity,
}


def check_type(subject: Subject, kv_type: KvType) -> Figures:
    """A text in K and V of the type. Only Q8_0 may be refused."""
    try:
        return against_exact(subject, KV_MODEL, 70, kv_type)
    except NotOffered as reason:
        if kv_type is KvType.Q8_0:
            raise
        raise Wrong(f"K and V in {kv_type}, which every backend has", f"a refusal: {reason}") from reason


def check_scenario(subject: Subject, scenario: Callable[[Texts], None], kv_type: KvType) -> Figures:
    with _texts(subject, kv_type) as texts:
        scenario(texts)
    return {"error": texts.error}


@contextmanager
def _texts(subject: Subject, kv_type: KvType) -> Iterator[Texts]:
    with subject.part(KV_MODEL, Slice(LAYERS, True, True, kv_type)) as shard:
        yield Texts(subject, Loaded(tuple((shard, layers) for layers in LAYERS)), kv_type)


def shortened(sequence: int, length: int, capacity: int) -> KvOp:
    return KvOp(KvKind.MOVE, sequence, length, capacity, source=sequence)


def dropped(sequence: int) -> KvOp:
    return KvOp(KvKind.DROP, sequence)
