"""How often tokens choose each expert, of late: what decides which ones stay in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 64
"""Tokens after which a choice counts half. With choices by Zipf's law (exponents 0.5 to 1.5, 64 experts, room for 30
and 60 % of them) 32 to 512 give the same hit rates within 0.02 while habits last; where they change every 150 tokens,
64 is the best of these or within 0.02 of it, and above what is given by the least recently used as victims."""


class Frequencies:
    """`shares[row, e]`: which share of a layer's tokens chose expert e, later ones weighing more.

    A layer has a clock of its own, its tokens: in the midst of a long prompt those that had it already are not ahead.
    At first all are alike.
    """

    def __init__(self, n_layers: int, n_experts: int, n_used: int) -> None:
        self.shares = np.full((n_layers, n_experts), n_used / n_experts)
        self._n_used = n_used

    def count(self, row: int, counts: NDArray[np.intp]) -> None:
        """`counts[e]` of the tokens that go through the row-th layer together chose expert e."""
        n_tokens = counts.sum() / self._n_used
        if n_tokens > 0:
            kept = 0.5 ** (n_tokens / HALF_LIFE)
            self.shares[row] *= kept
            self.shares[row] += (1 - kept) / n_tokens * counts
