"""Local search: small changes of a way, as long as the judge finds a faster one and there is work left to spend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import combinations, groupby
from random import Random

from prima_halda.cluster import Cluster
from prima_halda.judge import Judge, Trial, Work
from prima_halda.memory import Way

Runs = tuple[tuple[int, int], ...]
"""Places and how many layers they compute, in turn."""

_FEW_RUNS = 12
"""With more, layers go only from the longest run of a place to the shortest of another."""
_FEW_LAYERS = 24
_FEW_CHANGES = 40
"""With no more layers, and no more ways to lay one elsewhere, single ones are tried out, and two at once."""
_FACTORS = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0, 3.0, 5.0)


@dataclass(slots=True)
class Budget:
    """Layers that may be simulated before the search ends: the same on every machine, as no clock is."""

    work: Work
    n_steps: int

    @classmethod
    def more(cls, work: Work, n_steps: int) -> Budget:
        """From now on."""
        return cls(work, work.n_steps + n_steps)

    @property
    def left(self) -> int:
        return max(0, self.n_steps - self.work.n_steps)

    @property
    def is_spent(self) -> bool:
        return self.work.n_steps >= self.n_steps


def improved(judge: Judge, trial: Trial, budget: Budget, *, same_visits: bool = False) -> Trial:
    """The best way that can be reached by changes of which each helps. `same_visits`: the nodes are visited in the same
    order as often as now."""
    best, is_better = trial, True
    while is_better and not budget.is_spent:
        is_better = False
        for way in _neighbours(judge.cluster, runs_of(best.way), same_visits):
            if budget.is_spent:
                break
            found = judge.trial(way, best)
            if found is not None:
                best, is_better = found, True
                break
    return best


def repaired(judge: Judge, way: Way, budget: Budget) -> Way:
    """A way that lacks less memory, if it can be none, by single layers that go elsewhere or change places."""
    lacks, is_better = judge.lacks(way), True
    while lacks and is_better and not budget.is_spent:
        is_better = False
        for other in _by_layers(judge.cluster, way, of=frozenset(lacks)):
            less = judge.lacks(other)
            if sum(less.values()) < sum(lacks.values()):
                way, lacks, is_better = other, less, True
                break
            if budget.is_spent:
                break
    return way


def kicked(judge: Judge, trial: Trial, chance: Random, budget: Budget) -> Trial:
    """The best way near another one, that is some steps away; or the same as now."""
    found = judge.trial(repaired(judge, shaken(judge.cluster, trial.way, chance), budget))
    if found is None:
        return trial
    return min(trial, improved(judge, found, budget), key=lambda one: one.time_s)


def shaken(cluster: Cluster, way: Way, chance: Random) -> Way:
    changed = list(way)
    for _ in range(chance.choice((2, 3, 4, 4 * len(way)))):  # so many that nothing is left, at times
        a, b = chance.randrange(len(way)), chance.randrange(len(way))
        if chance.random() < 0.5:
            changed[a], changed[b] = changed[b], changed[a]
        else:
            changed[min(a, b) : max(a, b)] = [chance.randrange(len(cluster.places))] * abs(a - b)
    return tuple(changed)


def with_better_buffers(judge: Judge, trial: Trial, budget: Budget) -> Trial:
    """The same way with other buffers, one node's after another's."""
    best, is_better = trial, True
    while is_better and not budget.is_spent:
        is_better = False
        for index in sorted(best.buffers):
            for factor in _FACTORS:
                sizes = {**best.buffers, index: int(best.buffers[index] * factor)}
                found = judge.trial(best.way, best, sizes)
                if found is not None:
                    best, is_better = found, True
    return best


def runs_of(way: Way) -> Runs:
    return tuple((place, sum(1 for _ in run)) for place, run in groupby(way))


def way_of(runs: Sequence[tuple[int, int]]) -> Way:
    return tuple(place for place, length in runs for _ in range(length))


def _neighbours(cluster: Cluster, runs: Runs, same_visits: bool) -> Iterator[Way]:
    yield from _transfers(runs, same_visits)
    if same_visits:
        return
    yield from _merges(cluster, runs)
    yield from _emptied(cluster, runs)
    yield from _swaps(runs)
    yield from _exchanges(cluster, runs)
    yield from _insertions(cluster, runs)
    if len(way := way_of(runs)) <= _FEW_LAYERS:
        yield from _by_layers(cluster, way, of=frozenset(range(len(cluster.members))))
    if len(way) * len(cluster.places) <= _FEW_CHANGES:
        yield from _by_pairs(cluster, way)


def _transfers(runs: Runs, same_visits: bool) -> Iterator[Way]:
    """Layers go from one run to another, and all between move on."""
    for source, target in _pairs(runs):
        for step in (1, 2, 4):
            left = runs[source][1] - step
            if left >= (1 if same_visits else 0):
                yield way_of(_with(_with(runs, source, left), target, runs[target][1] + step))


def _pairs(runs: Runs) -> Iterator[tuple[int, int]]:
    if len(runs) <= _FEW_RUNS:
        yield from ((a, b) for a in range(len(runs)) for b in range(len(runs)) if a != b)
        return
    longest: dict[int, int] = {}
    shortest: dict[int, int] = {}
    for index, (place, length) in enumerate(runs):
        if place not in longest or length > runs[longest[place]][1]:
            longest[place] = index
        if place not in shortest or length < runs[shortest[place]][1]:
            shortest[place] = index
    yield from ((a, b) for p, a in longest.items() for q, b in shortest.items() if p != q)


def _with(runs: Runs, index: int, length: int) -> Runs:
    return (*runs[:index], (runs[index][0], length), *runs[index + 1 :])


def _merges(cluster: Cluster, runs: Runs) -> Iterator[Way]:
    """A run goes to another place; its neighbours' places among them, so that visits become fewer."""
    for index, (place, length) in enumerate(runs):
        for other in range(len(cluster.places)):
            if other != place:
                yield way_of((*runs[:index], (other, length), *runs[index + 1 :]))


def _emptied(cluster: Cluster, runs: Runs) -> Iterator[Way]:
    """All runs of a place go to another one, or each to the one before or behind."""
    for place in dict.fromkeys(place for place, _ in runs):
        for other in range(len(cluster.places)):
            if other != place:
                yield way_of([(other if own == place else own, length) for own, length in runs])
        yield way_of(_given_on(runs, place))
        yield way_of(_given_on(runs[::-1], place)[::-1])


def _given_on(runs: Runs, place: int) -> list[tuple[int, int]]:
    """What the place has goes to the one before."""
    given = list[tuple[int, int]]()
    for own, length in runs:
        given.append((given[-1][0] if given and own == place else own, length))
    return given


def _swaps(runs: Runs) -> Iterator[Way]:
    for a in range(len(runs)):
        for b in range(a + 1, len(runs)):
            swapped = list(runs)
            swapped[a], swapped[b] = runs[b], runs[a]
            yield way_of(swapped)


def _exchanges(cluster: Cluster, runs: Runs) -> Iterator[Way]:
    """Two nodes change places everywhere."""
    members = cluster.members
    for a in range(len(members)):
        for b in range(a + 1, len(members)):
            if len(members[a].places) == len(members[b].places):
                pairs = zip(members[a].places, members[b].places, strict=True)
                to = {x.number: y.number for one, other in pairs for x, y in ((one, other), (other, one))}
                yield way_of([(to.get(place, place), length) for place, length in runs])


def _insertions(cluster: Cluster, runs: Runs) -> Iterator[Way]:
    """A place gets a layer out of a run: from its start, its middle, its end."""
    for index, (place, length) in enumerate(runs):
        for other in range(len(cluster.places)):
            if other == place:
                continue
            for before in sorted({0, (length - 1) // 2, length - 1}):
                inside = ((place, before), (other, 1), (place, length - 1 - before))
                yield way_of((*runs[:index], *inside, *runs[index + 1 :]))


def _by_layers(cluster: Cluster, way: Way, *, of: Set[int]) -> Iterator[Way]:
    """A layer of these nodes goes to another place, or changes places with any other."""
    theirs = [layer for layer, place in enumerate(way) if cluster.places[place].member in of]
    for layer, place in _changes(cluster, way, theirs):
        yield (*way[:layer], place, *way[layer + 1 :])
    for a in theirs:
        for b in range(len(way)):
            if way[a] != way[b] and (a < b or b not in theirs):
                yield _with_two(way, (a, way[b]), (b, way[a]))


def _by_pairs(cluster: Cluster, way: Way) -> Iterator[Way]:
    """Any two layers go anywhere."""
    for one, other in combinations(_changes(cluster, way, range(len(way))), 2):
        if one[0] != other[0]:
            yield _with_two(way, one, other)


def _changes(cluster: Cluster, way: Way, layers: Iterable[int]) -> list[tuple[int, int]]:
    return [(layer, place) for layer in layers for place in range(len(cluster.places)) if way[layer] != place]


def _with_two(way: Way, one: tuple[int, int], other: tuple[int, int]) -> Way:
    changed = list(way)
    changed[one[0]], changed[other[0]] = one[1], other[1]
    return tuple(changed)
