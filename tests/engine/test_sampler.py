"""From logits to tokens: greedy, and drawn as often as the probabilities say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.engine.request import GREEDY, Sampling
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import Wanted
from prima_core.errors import ModelError, RequestError

N_DRAWS = 3000
LOGITS = (1.0, 3.0, -2.0, 2.5, 2.0, 0.0, -0.5, 2.5)


def row(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def draw(logits: NDArray[np.float32], sampling: Sampling, index: int, /, **history: tuple[int, ...]) -> int:
    counts = Counter(history.pop("generated", ()))
    return sample(logits, Wanted(0, 0, sampling, index, generated=counts, **history)).token


def drawn(logits: Sequence[float], sampling: Sampling, n: int = N_DRAWS, /, **history: tuple[int, ...]) -> list[int]:
    return [draw(row(logits), sampling, index, **history) for index in range(n)]


def changed(
    logits: Sequence[float],
    sampling: Sampling,
    recent: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
) -> list[float]:
    """The logits after bias, penalties and bans, a token after the other."""
    changed = list(logits)
    for token, bias in sampling.logit_bias:
        changed[token] += bias
    for token in range(len(logits)):
        if token in recent:
            factor = sampling.repetition_penalty
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        if token in generated:
            changed[token] -= generated.count(token) * sampling.frequency_penalty + sampling.presence_penalty
        if token in banned:
            changed[token] = -math.inf
    return changed


def until(tokens: Sequence[int], p: dict[int, float], share: float) -> list[int]:
    """The first tokens that make up the share; the one that crosses it is one of them."""
    kept, mass, total = [], 0.0, sum(p[token] for token in tokens)
    for token in tokens:
        kept.append(token)
        mass += p[token] / total
        if mass >= share:
            break
    return kept


def probabilities(logits: Sequence[float], sampling: Sampling, **history: tuple[int, ...]) -> dict[int, float]:
    """What should be drawn how often, said differently: lists of tokens that get shorter."""
    changed_logits = changed(logits, sampling, **history)
    weights = {token: math.exp(logit / sampling.temperature) for token, logit in enumerate(changed_logits)}
    order = sorted(weights, key=lambda token: (-weights[token], token))[: sampling.top_k or None]
    total = sum(weights[token] for token in order)
    if sampling.typical_p < 1:
        surprise = {token: -math.log(weights[token] / total) for token in order if weights[token]}
        entropy = sum(weights[token] / total * surprise[token] for token in surprise)
        typical = sorted(surprise, key=lambda token: (round(abs(surprise[token] - entropy), 6), token))
        kept = set(until(typical, weights, sampling.typical_p))
        order = [token for token in order if token in kept]
    if sampling.top_p < 1:
        order = until(order, weights, sampling.top_p)
    order = [token for token in order if weights[token] >= sampling.min_p * weights[order[0]] and weights[token]]
    total = sum(weights[token] for token in order)
    return {token: weights[token] / total for token in order}


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
        Sampling(min_p=0.3),
        Sampling(min_p=0.3, temperature=2.0),
        Sampling(typical_p=0.6),
        Sampling(typical_p=0.3, temperature=3.0),
        Sampling(temperature=1.5, top_k=6, typical_p=0.9, top_p=0.9, min_p=0.2),
        Sampling(top_p=0.9, min_p=0.4),
        Sampling(top_p=0.5, min_p=0.1),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    check_fit(drawn(LOGITS, sampling), probabilities(LOGITS, sampling))


HISTORY: dict[str, tuple[int, ...]] = {"recent": (1, 2, 2, 5), "generated": (1, 3, 3, 3, 4)}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.5),
        Sampling(repetition_penalty=0.5),
        Sampling(frequency_penalty=0.5),
        Sampling(frequency_penalty=-0.3),
        Sampling(presence_penalty=1.2),
        Sampling(frequency_penalty=0.4, presence_penalty=-1.0),
        Sampling(logit_bias=((2, 4.0), (1, -2.5), (7, -math.inf))),
        Sampling(
            logit_bias=((2, 4.0), (1, 1.0)), repetition_penalty=1.3, presence_penalty=0.5, top_k=4, temperature=0.8
        ),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.2, min_p=0.1, top_p=0.95, typical_p=0.95),
    ],
    ids=str,
)
@pytest.mark.parametrize("banned", [(), (1, 6)], ids=["nothing banned", "1 and 6 banned"])
def test_tokens_come_as_often_as_penalties_and_bias_say(sampling: Sampling, banned: tuple[int, ...]) -> None:
    history = {**HISTORY, "banned": banned}
    check_fit(drawn(LOGITS, sampling, **history), probabilities(LOGITS, sampling, **history))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=3.0),
        Sampling(presence_penalty=2.0),
        Sampling(frequency_penalty=0.7),
        Sampling(logit_bias=((5, 4.0),)),
        Sampling(logit_bias=((0, 2.0), (7, 0.5))),
    ],
    ids=str,
)
def test_the_likeliest_token_is_the_likeliest_after_bias_penalties_and_bans(sampling: Sampling) -> None:
    for banned in ((), (3, 7)):
        history = {**HISTORY, "banned": banned}
        expected = changed(LOGITS, sampling, **history)
        greedy = replace(sampling, temperature=0.0)
        assert draw(row(LOGITS), greedy, 0, **history) == expected.index(max(expected))


def test_the_logits_are_left_as_they_are() -> None:
    logits = row(LOGITS)
    sample(logits, Wanted(0, 0, Sampling(logit_bias=((1, 5.0),), repetition_penalty=2.0), 0, (1,), {1: 1}, (2,)))
    assert logits.tolist() == list(LOGITS)


def test_biases_of_the_same_token_add_up() -> None:
    assert draw(row([0, 3]), Sampling(temperature=0, logit_bias=((0, 2.0), (0, 2.0))), 0) == 0


def test_the_same_index_under_many_seeds_is_random_as_well() -> None:
    tokens = [draw(row(LOGITS), Sampling(seed=seed), 5) for seed in range(N_DRAWS)]
    check_fit(tokens, probabilities(LOGITS, Sampling()))


def test_a_token_says_nothing_about_the_next_one() -> None:
    tokens = drawn((0.0, 0.0), Sampling(seed=9))
    pairs = [2 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    check_fit(pairs, dict.fromkeys(range(4), 0.25))


def large(scale: float = 3.0) -> NDArray[np.float32]:
    """As wide as real vocabularies: ways that are shorter for many tokens must lead to the same place."""
    return np.random.default_rng(1).normal(0, scale, 50_000).astype(np.float32)


@pytest.mark.parametrize("scale", [0.5, 6.0], ids=["flat", "steep"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=4),
        Sampling(top_k=5000),
        Sampling(top_p=0.6),
        Sampling(top_p=0.9999),
        Sampling(min_p=0.2),
        Sampling(typical_p=0.5),
        Sampling(top_k=40, top_p=0.95, min_p=0.05, temperature=0.8),
        Sampling(top_p=0.9, min_p=0.01, temperature=0.5),
    ],
    ids=str,
)
def test_of_a_large_vocabulary_the_right_tokens_are_drawn(sampling: Sampling, scale: float) -> None:
    logits = large(scale)
    expected = probabilities([float(logit) for logit in logits], sampling)
    tokens = [draw(logits, sampling, index) for index in range(300)]
    assert set(tokens) <= set(expected)
    shares = np.cumsum(list(expected.values()))
    ten = np.searchsorted(shares, np.linspace(0, shares[-1], 10, endpoint=False)[1:])  # ten groups of about a tenth
    group = {token: int(np.searchsorted(ten, at)) for at, token in enumerate(expected)}
    groups = [0.0] * 10
    for token, p in expected.items():
        groups[group[token]] += p
    check_fit([group[token] for token in tokens], {at: p for at, p in enumerate(groups) if p})


def test_without_cuts_every_part_of_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    logits = large(1.0)
    tokens = [draw(logits, Sampling(), index) for index in range(3000)]
    p = np.exp(logits.astype(np.float64))
    parts = [float(part.sum() / p.sum()) for part in np.split(p, 10)]
    check_fit([token // 5000 for token in tokens], dict(enumerate(parts)))


@pytest.mark.parametrize("sampling", [Sampling(top_k=5), Sampling(top_p=1e-4), Sampling(top_k=7, top_p=0.5)], ids=str)
def test_of_many_equal_tokens_the_first_are_kept(sampling: Sampling) -> None:
    n = {5: 5, 0: 2, 7: 4}[sampling.top_k]
    logits = np.zeros(20_000, np.float32)
    logits[:10] = -1.0
    assert {draw(logits, sampling, index) for index in range(300)} == set(range(10, 10 + n))


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


def test_a_row_among_others_gives_what_it_gives_alone() -> None:
    sampling = Sampling(temperature=1.3, top_p=0.9, logprobs=3)
    batch = np.random.default_rng(2).normal(0, 3, (5, 30_001)).astype(np.float32)  # rows lie on odd addresses
    for index, logits in enumerate(batch):
        want = Wanted(index, index, sampling, index)
        assert sample(logits, want) == sample(logits.copy(), replace(want, row=0, sequence=0))


def test_other_seeds_give_other_tokens() -> None:
    assert len({tuple(drawn(LOGITS, Sampling(seed=seed), 20)) for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_every_seed_of_64_bits_is_one(seed: int) -> None:
    check_fit(drawn(LOGITS, Sampling(seed=seed), 2000), probabilities(LOGITS, Sampling()))


# ---------------------------------------------------------------- log probabilities


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    return np.asarray(x - x.max() - math.log(np.exp(x - x.max()).sum()))


@pytest.mark.parametrize("n", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(top_k=3, temperature=2.0), Sampling(logit_bias=((9, 30.0),))], ids=str
)
def test_log_probabilities_are_those_of_the_model(sampling: Sampling, n: int) -> None:
    logits = large()
    expected = log_softmax(logits)
    told = sample(logits, Wanted(0, 0, replace(sampling, logprobs=n), 3, recent=(1, 2), banned=(5,)))
    assert told.token == draw(logits, sampling, 3, recent=(1, 2), banned=(5,))
    assert told.logprob == pytest.approx(expected[told.token], abs=1e-6)
    likeliest = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:n]
    assert [token for token, _ in told.top] == likeliest
    assert [logprob for _, logprob in told.top] == pytest.approx(expected[likeliest], abs=1e-6)


def test_of_equal_tokens_the_first_are_told() -> None:
    told = sample(row([0, 2, 2, 1, 2]), Wanted(0, 0, Sampling(temperature=0, logprobs=2), 0))
    assert [token for token, _ in told.top] == [1, 2]


def test_tokens_of_no_probability_are_not_told() -> None:
    told = sample(row([-math.inf, 2, -math.inf, 2]), Wanted(0, 0, Sampling(temperature=0, logprobs=20), 0))
    assert [token for token, _ in told.top] == [1, 3]
    assert [logprob for _, logprob in told.top] == pytest.approx([math.log(0.5)] * 2)


def test_nothing_is_told_that_was_not_asked_for() -> None:
    told = sample(row(LOGITS), Wanted(0, 0, Sampling(), 0))
    assert (told.logprob, told.top) == (None, ())


# ---------------------------------------------------------------- nothing to draw


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.5, min_p=0.1, typical_p=0.5)], ids=str)
def test_when_everything_is_banned_that_is_an_error(sampling: Sampling) -> None:
    with pytest.raises(RequestError, match="no token"):
        draw(row([1, 2, 3]), replace(sampling, logit_bias=((0, -math.inf),)), 0, banned=(1, 2))


def test_what_is_banned_is_never_drawn_however_much_it_is_liked() -> None:
    sampling = Sampling(logit_bias=((1, 100.0),))
    assert set(drawn([0, 50, 0], sampling, 200, banned=(1,))) == {0, 2}


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
