"""What each type of weights has of the time that mixtures of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SHARE = 0.02
"""Types with less of every run's bytes cannot be told apart from the rest: norms, mostly."""
MOST_APART = 8.0
"""So many times as fast as all together, or as slow, no type is: it would be noise."""
_RIDGE = 0.03


@dataclass(frozen=True, slots=True)
class Run:
    """Weight bytes by type, and the seconds that a step took through them."""

    types: Mapping[str, float]
    took_s: float


def seconds_by_type(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds per byte of each type that has enough bytes.

    Least squares over the runs; what they do not tell (all of them have the same mixture) is taken to be as for all
    together, by ridge regression towards that.
    """
    mean = sum(run.took_s for run in runs) / sum(sum(run.types.values()) for run in runs)
    names = sorted({name for run in runs for name in run.types if _share(run, name) >= LEAST_SHARE})
    shares = np.array([[_share(run, name) for name in names] for run in runs])
    apart = np.array([run.took_s / sum(run.types.values()) / mean - 1 for run in runs])
    ridge = _RIDGE * np.eye(len(names))
    found = np.linalg.lstsq(np.vstack((shares, ridge)), np.concatenate((apart, np.zeros(len(names)))), rcond=None)[0]
    times = np.clip(1 + found, 1 / MOST_APART, MOST_APART)
    return {name: mean * float(time) for name, time in zip(names, times, strict=True)}


def _share(run: Run, name: str) -> float:
    return run.types.get(name, 0.0) / sum(run.types.values())
