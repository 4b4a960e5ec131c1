"""Steps through shards by hand: what a ring does, without a ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Chunk, KvKind, KvOp, Layers, Shard, Step

FloatArray = NDArray[np.float32]
Visit = tuple[Shard, Layers]


def opened(sequence: int, capacity: int = 64) -> KvOp:
    return KvOp(KvKind.OPEN, sequence, capacity=capacity)


def step_of(sequence: int, ids: Sequence[int], start: int = 0, kv: Sequence[KvOp] = ()) -> Step:
    return Step((Chunk(sequence, start, len(ids)),), tuple(kv), tuple(ids))


def joined(*steps: Step) -> Step:
    """One step with the rows of all, in order."""
    return Step(
        tuple(chunk for step in steps for chunk in step.chunks),
        tuple(op for step in steps for op in step.kv),
        tuple(token for step in steps for token in step.tokens),
    )


def pass_through(visits: Sequence[Visit], step: Step) -> FloatArray:
    """The activation after all visits; the first shard has the input part."""
    x = visits[0][0].embed(step)
    for shard, layers in visits:
        x = shard.run(layers, x, step)
    return x


def logits_of_all(visits: Sequence[Visit], step: Step) -> FloatArray:
    """[n_tokens, vocab]; the last shard has the output part."""
    return visits[-1][0].logits(pass_through(visits, step), range(step.n_tokens))


def chunked(sequence: int, ids: Sequence[int], chunk: int, capacity: int = 64) -> Iterator[Step]:
    """Opens the sequence and prefills it in chunks."""
    for start in range(0, len(ids), chunk):
        kv = [opened(sequence, capacity)] if start == 0 else []
        yield step_of(sequence, ids[start : start + chunk], start, kv)
