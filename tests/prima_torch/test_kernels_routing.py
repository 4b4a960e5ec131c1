"""Routing in Triton's interpreter: the experts that numpy takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prima_core.arch.ops import RoutingRule
from prima_numpy.ops import route as expected_route
from prima_torch.kernels.routing import BLOCK, mix, route


@pytest.mark.parametrize("rule", [RoutingRule(2), RoutingRule(6, normalize=False), RoutingRule(8, scale=2.5)], ids=str)
@pytest.mark.parametrize("n_experts", [8, 60])
def test_experts_and_weights_are_those_of_numpy(rule: RoutingRule, n_experts: int) -> None:
    scores = 3 * np.random.default_rng(1).standard_normal((4, n_experts), np.float32)
    scores[1] = np.round(scores[1])  # ties
    scores[2] = 0
    experts, weights = route(torch.from_numpy(scores), rule)
    chosen, shares = expected_route(scores, rule)
    assert experts.dtype == torch.int32
    assert experts.tolist() == chosen.tolist()
    torch.testing.assert_close(weights, torch.from_numpy(shares), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "bad", [[torch.nan] * 3, [torch.nan, 1, torch.nan], [-torch.inf] * 3, [torch.inf, 1, torch.inf]]
)
def test_the_experts_are_there_and_differ_whatever_the_scores(bad: list[float]) -> None:
    experts, _ = route(torch.tensor([bad]), RoutingRule(3))
    assert sorted(experts[0].tolist()) == [0, 1, 2]


def test_answers_are_weighted_and_added_up() -> None:
    answers, weights = torch.rand(6, BLOCK + 3), torch.rand(2, 3)
    expected = (answers.reshape(2, 3, -1) * weights[:, :, None]).sum(1)
    torch.testing.assert_close(mix(answers, weights), expected)
