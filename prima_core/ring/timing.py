"""How long steps take through what a device has loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from statistics import median

import numpy as np
from numpy.typing import NDArray

from prima_core.errors import ClusterError
from prima_core.interfaces import Chunk, KvKind, KvOp, Layers, Shard, Step

Stop = Callable[[], bool]

TIMED_S = 0.3
LONG_S = 2.0
"""Nobody waits for a second step of this length."""
LEAST_RUNS = 3
POSITIONS = 512
_N_ROWS = 256
_SEED = 1


def layer_times(shard: Shard, runs: Sequence[Layers], width: int, d_model: int, stop: Stop) -> tuple[float, ...]:
    """Seconds of a step of `width` tokens for each of these runs of layers, which are gone through in turn."""
    rows = _rows(d_model)

    def decode() -> Iterator[list[float]]:
        """A token after the other, of one sequence."""
        for position in range(POSITIONS):
            opening = (KvOp(KvKind.OPEN, 1, capacity=POSITIONS),) if position == 0 else ()
            x = rows[position % _N_ROWS : position % _N_ROWS + 1]
            yield [_time_of(shard, layers, x, Step((Chunk(1, position, 1),), opening)) for layers in runs]

    def prompts() -> Iterator[list[float]]:
        step = Step((Chunk(1, 0, width),), (KvOp(KvKind.OPEN, 1, capacity=width),))
        while True:
            times = [_time_of(shard, layers, rows[:width], step) for layers in runs]
            _forget(shard, runs, d_model)
            yield times

    times = _enough(decode() if width == 1 else prompts(), stop)
    if width == 1:
        _forget(shard, runs, d_model)
    middle = median if width == 1 else min
    return tuple(middle(of_run) for of_run in zip(*times, strict=True))


def output_times(shard: Shard, width: int, d_model: int, stop: Stop) -> float:
    """Seconds until the logits of so many rows are there."""
    x, wanted = _rows(d_model)[:width], range(width)

    def steps() -> Iterator[list[float]]:
        for _ in count():
            start = time.perf_counter()
            shard.logits(x, wanted)
            yield [time.perf_counter() - start]

    return median(took_s for [took_s] in _enough(steps(), stop))


def _forget(shard: Shard, runs: Sequence[Layers], d_model: int) -> None:
    for layers in runs:
        shard.run(layers, np.zeros((0, d_model), np.float32), Step((), (KvOp(KvKind.DROP, 1),)))


def _enough(times: Iterator[list[float]], stop: Stop) -> list[list[float]]:
    """As many as come in TIMED_S, without the first, which finds nothing in place; that one alone where it takes so
    long that nobody would wait for more."""
    first, done = next(times), list[list[float]]()
    if sum(first) > LONG_S:
        return [first]
    spent_s = 0.0
    while spent_s < TIMED_S or (len(done) < LEAST_RUNS and spent_s < LONG_S):
        if stop():
            raise ClusterError("the measurement was given up")
        took_s = next(times, None)
        if took_s is None:
            break
        done.append(took_s)
        spent_s += sum(took_s)
    return done


def _time_of(shard: Shard, layers: Layers, x: NDArray[np.float32], step: Step) -> float:
    start = time.perf_counter()
    shard.run(layers, x, step)
    return time.perf_counter() - start


def _rows(d_model: int) -> NDArray[np.float32]:
    """All different, so that tokens are routed to different experts."""
    return np.random.default_rng(_SEED).standard_normal((_N_ROWS, d_model), np.float32)
