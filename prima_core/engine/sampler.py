"""From logits to a token id: a pure function of the logits, the sampling data and the token's index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from prima_core.engine.request import Sampled, Sampling
from prima_core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prima_core.engine.scheduler import Wanted


def sample(logits: NDArray[np.float32], want: Wanted) -> Sampled:
    """Draw the wanted token from logits [vocab_size].

    The same logits and the same `want` (but for its row and sequence) always give the same token, whatever else is
    running: the random number comes from a counter-based generator keyed with the seed, not from a shared stream.
    Ties go to the lowest id.
    Raises ModelError when no token is likeliest: a logit is NaN or infinite, or all are -infinite.
    """
    if not np.isfinite(logits.max()):  # also when any logit is NaN
        raise ModelError("the model computed logits that are not finite", hint="is its file intact?")
    return Sampled(_draw(logits, want.sampling, want.index))


def _draw(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    if sampling.temperature <= 0 or sampling.top_k == 1:
        return int(np.argmax(logits))
    ids = _most_likely(logits, sampling.top_k)
    p = _softmax(logits[ids].astype(np.float64), sampling.temperature)
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1  # the token that crosses top_p stays
        ids, p = ids[:keep], p[:keep]
    cumulative = np.cumsum(p)
    chosen = np.searchsorted(cumulative, _uniform(sampling.seed, index) * cumulative[-1], side="right")
    return int(ids[min(int(chosen), len(ids) - 1)])


def _most_likely(logits: NDArray[np.float32], top_k: int) -> NDArray[np.intp]:
    """Ids by falling logit, ties by rising id; only the first `top_k` if it is positive."""
    if 0 < top_k < len(logits):
        threshold = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        candidates = np.flatnonzero(logits >= threshold)
        return candidates[np.argsort(-logits[candidates], kind="stable")][:top_k]
    return np.argsort(-logits, kind="stable")


def _softmax(x: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """`x` falls. The first is taken off before dividing, so that no temperature is too small."""
    with np.errstate(over="ignore"):
        e: NDArray[np.float64] = np.exp((x - x[0]) / temperature)
    e /= e.sum()
    return e


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on seed and index only (Philox 4x64, a counter-based generator)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=index)
    return (int(generator.random_raw()) >> 11) / 2**53  # all 64 bits would round up to 1 at times
