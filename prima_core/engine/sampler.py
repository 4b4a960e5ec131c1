"""From logits to a token id: a pure function of the logits, the sampling data and the token's index.

The chain, in this order, each cut on what the one before it left:

1. logit_bias, then the repetition penalty, then frequency and presence penalties, then banned tokens.
2. temperature 0: the likeliest token, and nothing more. Else the logits are divided by it.
3. top_k, typical_p, top_p, min_p; then one token is drawn from what is left.

Bias and penalties come first, and the cuts stand in the order of llama.cpp's default chain. Temperature comes before
the cuts as OpenAI, vLLM and transformers have it; llama.cpp applies it last, so that there top_p, typical_p and min_p
see the distribution of temperature 1. Sources: repetition penalty, Keskar et al. 2019 (CTRL); frequency and presence
penalty, OpenAI's API reference; top_p, Holtzman et al. 2020; typical_p, Meister et al. 2023; min_p, Nguyen et al. 2024.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from prima_core.engine.request import Sampled, Sampling
from prima_core.errors import ModelError, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prima_core.engine.scheduler import Wanted

_N_GROUPS = 4096
_BLOCK = 1024
_COLDEST, _HOTTEST = 1e-30, 1e30
"""Temperatures beyond these make no difference, but do not divide well in float32."""
_NEVER = -1e4
"""An exponent of which nothing is left also in float64."""


def sample(logits: NDArray[np.float32], want: Wanted) -> Sampled:
    """Draw the wanted token from logits [vocab_size], which stay as they are.

    The same logits and the same `want` (but for its row and sequence) always give the same token, whatever else is
    running: the random number comes from a counter-based generator keyed with the seed, not from a shared stream.
    Ties go to the lowest id.
    Raises ModelError when no token is likeliest: a logit is NaN or infinite, or all are -infinite; RequestError when
    bias and bans leave no token.
    """
    likeliest = int(np.argmax(logits))  # the first NaN where any logit is one
    if not math.isfinite(logits[likeliest]):
        raise ModelError("the model computed logits that are not finite", hint="is its file intact?")
    adjusted = _adjusted(logits, want)
    if adjusted is not logits and not np.isfinite(adjusted.max()):
        raise RequestError(
            "logit_bias and what is banned leave no token to draw",
            param="logit_bias",
            hint="ban fewer tokens, or lower min_tokens",
        )
    is_greedy = adjusted is logits and want.sampling.temperature <= 0
    token = likeliest if is_greedy else _draw(adjusted, want.sampling, want.index)
    return Sampled(token) if want.sampling.logprobs is None else _with_logprobs(logits, token, want.sampling.logprobs)


# ---------------------------------------------------------------- bias, penalties, bans


def _adjusted(logits: NDArray[np.float32], want: Wanted) -> NDArray[np.float32]:
    """The logits themselves where nothing is to be changed, else a changed copy."""
    sampling = want.sampling
    if not (sampling.logit_bias or want.recent or want.generated or want.banned):
        return logits
    x = logits.copy()
    with np.errstate(over="ignore"):
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            np.add.at(x, list(ids), np.array(values, np.float32))
        if want.recent:
            seen = np.unique(want.recent)
            x[seen] = np.where(
                x[seen] > 0, x[seen] / sampling.repetition_penalty, x[seen] * sampling.repetition_penalty
            )
        if want.generated:
            n = len(want.generated)
            said, counts = np.fromiter(want.generated, np.intp, n), np.fromiter(want.generated.values(), np.int64, n)
            x[said] -= (counts * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
    x[list(want.banned)] = -np.inf
    return x


# ---------------------------------------------------------------- drawing


def _draw(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    if sampling.temperature <= 0 or sampling.top_k == 1:
        return int(np.argmax(logits))
    ids: NDArray[np.intp] | None = None  # None: all, without the cost of listing them
    if 0 < sampling.top_k < len(logits):
        ids = _likeliest(logits, sampling.top_k)
    exponents = _exponents(logits if ids is None else logits[ids].astype(np.float64), sampling.temperature)
    if sampling.typical_p < 1:
        kept = _typical(exponents, sampling.typical_p)
        ids, exponents = _among(ids, kept), exponents[kept]
    weights = np.exp(exponents, out=exponents)  # in place: fresh memory of this size costs more than the arithmetic
    if sampling.top_p < 1 or sampling.min_p > 0:
        kept = _nucleus(weights, sampling.top_p, sampling.min_p)
        ids, weights = _among(ids, kept), weights[kept]
    chosen = _pick(weights, _uniform(sampling.seed, index))
    return chosen if ids is None else int(ids[chosen])


def _among(ids: NDArray[np.intp] | None, kept: NDArray[np.intp]) -> NDArray[np.intp]:
    return kept if ids is None else ids[kept]


def _exponents(x: NDArray[np.floating], temperature: float) -> NDArray[np.floating]:
    """Logarithms of the weights: the greatest is 0, the least finite (its weight is 0 all the same)."""
    with np.errstate(over="ignore"):
        exponents: NDArray[np.floating] = x - x.max()
        exponents /= min(max(temperature, _COLDEST), _HOTTEST)
        np.maximum(exponents, _NEVER, out=exponents)
    return exponents


def _typical(exponents: NDArray[np.floating], typical_p: float) -> NDArray[np.intp]:
    """The tokens whose surprise is nearest to the expected one, until they make up typical_p.

    |-log p - entropy|, where the logarithm of the sum falls out. Only what may be kept is put into order: tokens below
    the floor make up less than 1 - typical_p together, so that the others suffice, and none of these is farther away.
    """
    weights = np.exp(exponents)
    total = float(weights.sum(dtype=np.float64))
    expected = float((weights * exponents).sum(dtype=np.float64)) / total
    floor = math.log((1 - typical_p) * total / len(weights))
    near = np.flatnonzero(exponents >= min(floor, 2 * expected))
    nearness = -np.abs(exponents[near] - expected)
    order = np.argsort(nearness)[::-1]  # not stable, which is several times as fast: `_first` decides between equals
    n = _n_until(weights[near[order]], typical_p * total)
    return near[_first(nearness, n, nearness[order[n - 1]])]


def _nucleus(weights: NDArray[np.floating], top_p: float, min_p: float) -> NDArray[np.intp]:
    """What top_p and min_p leave. Both keep the likeliest tokens, so that it does not matter which comes first.

    Only what may be kept is put into order: tokens below the floor make up less than 1 - top_p together.
    """
    total = float(weights.sum(dtype=np.float64))
    floor = (1 - top_p) * total / len(weights)
    kept = np.flatnonzero(weights >= max(floor, min_p * float(weights.max())))
    if top_p >= 1:
        return kept
    falling = np.sort(weights[kept])[::-1]
    n = _n_until(falling, top_p * total)
    return kept[_first(weights[kept], n, falling[n - 1])]


def _n_until(weights: NDArray[np.floating], mass: float) -> int:
    """How many of the first weights make up `mass`: the one that crosses it is one of them."""
    return min(int(np.searchsorted(np.cumsum(weights, dtype=np.float64), mass)) + 1, len(weights))


def _first(x: NDArray[np.floating], n: int, nth: np.floating) -> NDArray[np.intp]:
    """Where the `n` greatest are, by rising index, when the n-th is `nth`: of equal ones the first."""
    kept = x > nth
    equal = np.flatnonzero(x == nth)
    kept[equal[: n - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


def _likeliest(x: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ids of the `k` greatest, by rising id; of equal ones the first. At most all."""
    k = min(k, len(x))
    candidates = np.flatnonzero(x >= _below(x, k))
    values = x[candidates]
    return candidates[_first(values, k, np.partition(values, len(values) - k)[len(values) - k])]


def _below(x: NDArray[np.float32], k: int) -> float:
    """A number that at least the `k` greatest reach, and few others: the k-th greatest of the maxima of groups."""
    n_rows = len(x) // _N_GROUPS
    if n_rows < 2 or k > _N_GROUPS:
        return -np.inf
    maxima = x[: n_rows * _N_GROUPS].reshape(n_rows, _N_GROUPS).max(axis=0)
    return float(np.partition(maxima, _N_GROUPS - k)[_N_GROUPS - k])


def _pick(weights: NDArray[np.floating], uniform: float) -> int:
    """The index drawn by a number in [0, 1). In two steps: the running sum over a whole vocabulary is slow."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    target = uniform * blocks[-1]
    block = int(np.searchsorted(blocks, target, side="right"))
    within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    rest = target - (blocks[block - 1] if block else 0.0)
    rest = min(rest, np.nextafter(within[-1], 0))  # the two sums are rounded differently
    return block * _BLOCK + int(np.searchsorted(within, rest, side="right"))


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on seed and index only (Philox 4x64, a counter-based generator)."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=index)
    return (int(generator.random_raw()) >> 11) / 2**53  # all 64 bits would round up to 1 at times


# ---------------------------------------------------------------- log probabilities


def _with_logprobs(logits: NDArray[np.float32], token: int, n: int) -> Sampled:
    best = float(logits.max())
    total = math.log(float(np.exp(_exponents(logits, 1.0)).sum(dtype=np.float64)))
    ids = _likeliest(logits, n) if n else np.empty(0, np.intp)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    top = tuple((int(id_), float(logits[id_]) - best - total) for id_ in ids if logits[id_] > -np.inf)
    return Sampled(token, float(logits[token]) - best - total, top)
