"""Fewer visits for next to nothing: each costs what no forecast counts, as threads that wake up, and where a node
streams, only one step may be on its way when nodes are visited more than once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prima_halda.improve import Budget, Runs, improved, runs_of, way_of
from prima_halda.judge import Judge, Trial
from prima_halda.memory import Way
from prima_halda.timing import turns_of

WORTH = 1.01
"""So much slower a plan may be than the fastest that was found, if it has fewer visits."""
_IN_REACH = 1.1
"""Who is slower by more is not improved."""
_TRIED = 4


def with_fewer_visits(judge: Judge, trials: Sequence[Trial], best: Trial, budget: Budget) -> Trial:
    """Of the trials, and what small changes make of them, the one with the fewest visits that is worth it."""
    limit = Trial((), WORTH * best.time_s, WORTH * best.time_s, {}, best.output)
    found = _thinned(judge, _with_fewest(judge, trials, best, limit, budget), limit, budget)
    return improved(judge, found, budget, same_visits=True)


def n_visits(judge: Judge, way: Way) -> int:
    return len(turns_of(judge.cluster, way))


def _with_fewest(judge: Judge, trials: Sequence[Trial], best: Trial, limit: Trial, budget: Budget) -> Trial:
    by_visits: dict[int, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.time_s):
        if trial.time_s <= _IN_REACH * best.time_s:
            by_visits.setdefault(n_visits(judge, trial.way), trial)
    good = min((n for n, trial in by_visits.items() if trial.time_s <= limit.time_s), default=n_visits(judge, best.way))
    found = by_visits.get(good, best)
    fewer = sorted((n for n in by_visits if n < good), key=lambda n: by_visits[n].time_s)
    for n in sorted(fewer[:_TRIED], reverse=True):
        share = Budget.more(judge.work, budget.left // _TRIED)
        trial = improved(judge, by_visits[n], share, same_visits=True)
        if trial.time_s <= limit.time_s:
            found = trial
    return found


def _thinned(judge: Judge, trial: Trial, limit: Trial, budget: Budget) -> Trial:
    is_thinner = True
    while is_thinner and not budget.is_spent:
        is_thinner, n = False, n_visits(judge, trial.way)
        for way in _thinner(runs_of(trial.way)):
            if budget.is_spent:
                break
            found = judge.trial(way, limit) if n_visits(judge, way) < n else None
            if found is not None:
                trial, is_thinner = found, True
                break
    return trial


def _thinner(runs: Runs) -> Iterator[Way]:
    """A run's layers go to the next one of its place, before or behind."""
    for index in sorted(range(len(runs)), key=lambda index: runs[index][1]):
        place, length = runs[index]
        others = sorted((abs(other - index), other) for other in range(len(runs)) if other != index)
        for _, other in [pair for pair in others if runs[pair[1]][0] == place][:2]:
            changed = [*runs]
            changed[other] = (place, runs[other][1] + length)
            yield way_of([*changed[:index], *changed[index + 1 :]])
