"""From logits to tokens: greedy, and drawn as often as the probabilities say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.engine.request import GREEDY, Sampling
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import Wanted
from prima_core.errors import ModelError

N_DRAWS = 8000
LOGITS = (1.0, 3.0, -2.0, 2.5, 2.0, 0.0, -0.5, 2.5)


def row(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def draw(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    return sample(logits, Wanted(0, 0, sampling, index)).token


def drawn(logits: Sequence[float], sampling: Sampling, n: int = N_DRAWS) -> list[int]:
    return [draw(row(logits), sampling, index) for index in range(n)]


def probabilities(logits: Sequence[float], sampling: Sampling) -> dict[int, float]:
    """What should be drawn how often, said differently: a loop over the tokens from the likeliest on."""
    weights = {token: math.exp(logit / sampling.temperature) for token, logit in enumerate(logits)}
    order = sorted(weights, key=lambda token: (-weights[token], token))[: sampling.top_k or None]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def check_fit(tokens: Sequence[int], expected: dict[int, float]) -> None:
    """Chi-square: fails by chance once in a hundred thousand times, and the seeds are fixed."""
    from scipy.stats import chisquare

    assert set(tokens) <= set(expected)
    if len(expected) > 1:
        counts = [tokens.count(token) for token in expected]
        assert chisquare(counts, [p * len(tokens) for p in expected.values()]).pvalue > 1e-5


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0, top_k=1), Sampling(temperature=0, top_p=0.1)])
def test_the_likeliest_token_is_taken_and_of_equal_ones_the_first(sampling: Sampling) -> None:
    assert [draw(row([0, 2, 1, 2]), sampling, index) for index in range(20)] == [1] * 20


def test_tokens_of_no_probability_do_not_matter() -> None:
    assert draw(row([-math.inf, -3, -math.inf]), GREEDY, 0) == 1


# ---------------------------------------------------------------- how often


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.8),
        Sampling(top_p=0.31, temperature=2.0),
        Sampling(temperature=0.7, top_k=5, top_p=0.9),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    check_fit(drawn(LOGITS, sampling), probabilities(LOGITS, sampling))


def test_the_same_index_under_many_seeds_is_random_as_well() -> None:
    tokens = [draw(row(LOGITS), Sampling(seed=seed), 5) for seed in range(N_DRAWS)]
    check_fit(tokens, probabilities(LOGITS, Sampling()))


def test_a_token_says_nothing_about_the_next_one() -> None:
    tokens = drawn((0.0, 0.0), Sampling(seed=9))
    pairs = [2 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    check_fit(pairs, dict.fromkeys(range(4), 0.25))


def test_a_large_vocabulary_is_cut_and_drawn_as_a_small_one() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 50_000).astype(np.float32)
    sampling = Sampling(top_k=4)
    tokens = [draw(logits, sampling, index) for index in range(2000)]
    best = np.argsort(-logits)[:4]
    check_fit(tokens, {int(best[i]): p for i, p in probabilities(logits[best].tolist(), Sampling()).items()})


# ---------------------------------------------------------------- cuts


def test_of_equal_tokens_top_k_keeps_the_first() -> None:
    assert set(drawn([1, 2, 2, 2, 0], Sampling(top_k=2), 200)) == {1, 2}


def test_top_k_and_top_p_may_keep_everything() -> None:
    assert set(drawn([0, 0, 0], Sampling(top_k=0, top_p=1.0), 200)) == {0, 1, 2}


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, {0}), (0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (1.0, {0, 1})])
def test_top_p_keeps_the_token_that_crosses_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn([7, 7], Sampling(top_p=top_p), 200)) == kept


def test_tokens_of_no_probability_are_never_drawn() -> None:
    assert set(drawn([-math.inf, 0, -1e30, 0], Sampling(), 500)) == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_the_smallest_temperatures_are_as_none(temperature: float) -> None:
    assert set(drawn([1, 1.001, -5, 3e38, 2e38], Sampling(temperature=temperature), 50)) == {3}


def test_a_great_temperature_makes_all_alike() -> None:
    check_fit(drawn([0, 5, 10], Sampling(temperature=1e30), 3000), dict.fromkeys(range(3), 1 / 3))


# ---------------------------------------------------------------- seeds


def test_the_same_seed_and_index_give_the_same_token_whatever_was_drawn_before() -> None:
    sampling = Sampling(seed=42)
    forwards = drawn(LOGITS, sampling, 100)
    backwards = [draw(row(LOGITS), sampling, index) for index in reversed(range(100))]
    assert forwards == backwards[::-1]


def test_other_seeds_give_other_tokens() -> None:
    assert len({tuple(drawn(LOGITS, Sampling(seed=seed), 20)) for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_every_seed_of_64_bits_is_one(seed: int) -> None:
    check_fit(drawn(LOGITS, Sampling(seed=seed), 2000), probabilities(LOGITS, Sampling()))


# ---------------------------------------------------------------- logits that are none


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=2), Sampling(top_p=0.5)], ids=str)
@pytest.mark.parametrize(
    "logits",
    [(0, math.nan, 1), (math.nan,) * 3, (0, math.inf, 1), (math.inf, math.inf, 0), (-math.inf,) * 3],
    ids=str,
)
def test_logits_that_are_not_finite_are_an_error(logits: tuple[float, ...], sampling: Sampling) -> None:
    with pytest.raises(ModelError, match="not finite"):
        draw(row(logits), sampling, 0)
