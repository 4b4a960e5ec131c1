"""Each type's part of the time that mixtures take."""

from __future__ import annotations

import random

import pytest

from prima_core.ring.typerates import MOST_APART, Run, seconds_by_type

PURE, MIXED = {"Q4_K": 100.0}, {"Q4_K": 60.0, "Q6_K": 40.0}


def test_two_mixtures_tell_two_types_apart() -> None:
    found = seconds_by_type([Run(PURE, 100.0), Run(MIXED, 60.0 + 80.0)])
    assert found == pytest.approx({"Q4_K": 1.0, "Q6_K": 2.0}, rel=0.02)


def test_one_mixture_says_the_same_of_all_its_types() -> None:
    assert seconds_by_type([Run(MIXED, 300.0)]) == pytest.approx({"Q4_K": 3.0, "Q6_K": 3.0})


def test_more_types_than_mixtures_still_add_up() -> None:
    runs = [Run({"Q4_K": 50.0, "Q5_K": 25.0, "Q6_K": 25.0}, 130.0), Run({"Q4_K": 80.0, "Q6_K": 20.0}, 110.0)]
    found = seconds_by_type(runs)
    for run in runs:
        assert sum(n_bytes * found[name] for name, n_bytes in run.types.items()) == pytest.approx(run.took_s, rel=0.02)


def test_norms_are_no_type_of_their_own() -> None:
    found = seconds_by_type([Run({"Q4_K": 99.0, "F32": 1.0}, 100.0)])
    assert set(found) == {"Q4_K"}


def test_noise_does_not_make_a_type_impossibly_fast() -> None:
    found = seconds_by_type([Run(PURE, 100.0), Run({"Q4_K": 97.0, "Q6_K": 3.0}, 60.0)])
    mean = 160 / 200
    assert all(mean / MOST_APART <= byte_s <= mean * MOST_APART for byte_s in found.values())


def test_noise_of_a_few_percent_moves_no_layer_by_more_than_that() -> None:
    chance = random.Random(0)
    for _ in range(100):
        runs = [Run(PURE, 100 * chance.uniform(0.97, 1.03)), Run(MIXED, 120 * chance.uniform(0.97, 1.03))]
        found = seconds_by_type(runs)
        for run in runs:
            told = sum(n_bytes * found[name] for name, n_bytes in run.types.items())
            assert told == pytest.approx(run.took_s, rel=0.03)
