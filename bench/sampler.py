"""Microseconds to draw a token from the logits of a large vocabulary, on one thread.

    python bench/sampler.py [--vocab 152064] [--draws 300]

Two kinds of logits: "sure" have a few likely tokens before many unlikely ones, as a model's mostly are; in "flat" ones
thousands of tokens are about as likely, which is the most work for a cut. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from prima_core.engine.request import GREEDY, Sampling
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import Wanted

HISTORY = tuple(range(1000))
CASES = {
    "greedy": GREEDY,
    "temperature only": Sampling(temperature=0.8),
    "top_k 40": Sampling(temperature=0.8, top_k=40),
    "top_k 40, top_p 0.95, min_p 0.05": Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    "top_p 0.95": Sampling(temperature=0.8, top_p=0.95),
    "min_p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "typical_p 0.9": Sampling(temperature=0.8, typical_p=0.9),
    "greedy, logprobs 5": Sampling(temperature=0.0, logprobs=5),
    "greedy, penalties over 1000 tokens": Sampling(0.0, repetition_penalty=1.1, presence_penalty=0.5),
}


def rows(vocab: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2, vocab).astype(np.float32)
    sure = noise.copy()
    sure[rng.integers(0, vocab, 30)] += np.linspace(8, 16, 30, dtype=np.float32)
    return {"sure": sure, "flat": noise / np.float32(2)}


def median_us(logits: NDArray[np.float32], sampling: Sampling, draws: int) -> float:
    has_penalties = sampling.repetition_penalty != 1
    taken: list[float] = []
    for index in range(draws):
        want = (
            Wanted(0, 0, sampling, index, HISTORY, dict.fromkeys(HISTORY, 1))
            if has_penalties
            else Wanted(0, 0, sampling, index)
        )
        start = time.perf_counter()
        sample(logits, want)
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--draws", type=int, default=300)
    args = parser.parse_args()
    logits = rows(args.vocab)
    print(f"{'':36}" + "".join(f"{name:>10}" for name in logits))
    for name, sampling in CASES.items():
        print(f"{name:36}" + "".join(f"{median_us(row, sampling, args.draws):10.0f}" for row in logits.values()))


if __name__ == "__main__":
    main()
