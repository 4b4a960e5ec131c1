"""Which node gets the output part: the head, unless it is better elsewhere, or does not fit there."""

from __future__ import annotations

from dataclasses import replace

from prima_halda.improve import Budget, improved, repaired
from prima_halda.judge import Judges, Trial

_PROMISING = 1.03
"""With no other change a way may be so much slower: its layers have not yet moved to where there is room now."""
_TRIED = 2
_FEW_LAYERS = 24
"""With no more layers all that are promising are tried."""
_REPAIRS = 20
"""Nodes get this part of the work to make room."""


def with_output_elsewhere(judges: Judges, trial: Trial, budget: Budget) -> list[Trial]:
    """What becomes of a way if other nodes than its own get the output part: the most promising of them."""
    limit = replace(trial, time_s=_PROMISING * trial.time_s, about_s=float("inf"))
    repairs, found = Budget.more(judges.work, budget.left // _REPAIRS), list[Trial]()
    rounds = bool(judges.base.cluster.problem.rounds)
    for output in judges.outputs:
        if output != trial.output:
            judge = judges[output]
            way = repaired(judge, trial.way, repairs) if not rounds and judge.lacks(trial.way) else trial.way
            moved = judge.trial(way, limit)
            found += [] if moved is None else [moved]
    found.sort(key=lambda one: one.time_s)
    found = found if judges.base.cluster.n_layers <= _FEW_LAYERS else found[:_TRIED]
    for number, one in enumerate(found):
        share = Budget.more(judges.work, budget.left // (len(found) - number))
        found[number] = improved(judges[one.output], one, share, same_visits=rounds)
    return found
