"""Whether a way to lay the layers on places can be, and how good it is for the problem's goal.

This is `complete` and `predict` for thousands of ways: it counts the same, but only what changes from way to way. The
last word have the originals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prima_core.interfaces import Goal
from prima_core.plan.overlap import Reader, best_buffers
from prima_core.plan.pipeline import gathered_tokens, is_cpu, n_steps_of, prompt_s, usual_chunk
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import simulate
from prima_core.plan.stream import gather_bytes
from prima_halda.cluster import Cluster, Step
from prima_halda.memory import Load, Memory, Way
from prima_halda.timing import PASSES, Timing, Turn, turns_of

_GAIN = 1 - 1e-6
"""A smaller one is none."""
_SLACK = 1.01
"""Who is slower than his rival by more than that in the rough simulation is not followed closely."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A way that can be, with the output part on that node and the buffers (by node) with which the goal takes
    `time_s`, by a rough simulation `about_s`."""

    way: Way
    time_s: float
    about_s: float
    buffers: Mapping[int, int]
    output: int


@dataclass(slots=True)
class Work:
    """What the judges of one problem share. `n_steps`: about how many layers were simulated so far, which is what time
    goes to. `clusters`: with what other steps cost."""

    n_steps: int = 0
    clusters: dict[Step, Cluster] = field(default_factory=dict)


@dataclass(slots=True)
class Judge:
    """Of ways with the output part where the cluster has it."""

    cluster: Cluster
    work: Work = field(default_factory=Work)
    memory: Memory = field(init=False)
    _timings: dict[Step, Timing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = Memory(self.cluster)

    @property
    def output(self) -> int:
        return self.cluster.output.member

    def timing(self, step: Step) -> Timing:
        if step not in self._timings:
            if step not in self.work.clusters:
                self.work.clusters[step] = self.cluster.with_step(step)
            self._timings[step] = Timing(self.work.clusters[step].with_output(self.output))
        return self._timings[step]

    def trial(self, way: Way, rival: Trial | None = None, buffers: Mapping[int, int] | None = None) -> Trial | None:
        """None: it cannot be, or seems to be no faster than its rival. `buffers`: not the best ones, but these."""
        self.work.n_steps += 2 + len(way) // 16
        visits = turns_of(self.cluster, way)
        match self.cluster.problem.goal:
            case Goal.LATENCY:
                return self._in_turn(way, visits, rival, buffers)
            case Goal.THROUGHPUT:
                return self._of_many(way, visits, rival, buffers)
            case Goal.TTFT:
                return self._of_prompt(way, visits, rival, buffers)

    def lacks(self, way: Way) -> dict[int, int]:
        """Bytes that must be added to memory of nodes before a way can be; empty where it can be already, or almost."""
        self.work.n_steps += 2 + len(way) // 16
        return self.memory.lacks(way)

    # ------------------------------------------------------------ one step at a time

    def _in_turn(
        self, way: Way, visits: Sequence[Turn], rival: Trial | None, buffers: Mapping[int, int] | None
    ) -> Trial | None:
        under_s = rival.time_s * _GAIN if rival is not None else float("inf")
        timing = self.timing(self.cluster.step)
        computing = timing.computing(visits)
        busy_s = sum(computing.values()) + timing.links_s(visits)
        loads = self.memory.loads(way) if busy_s < under_s else None
        if loads is None:
            return None
        if not loads:
            return Trial(way, busy_s, busy_s, {}, self.output)
        readers = timing.readers(visits, loads, computing)
        busy_s += sum(timing.demanded_s(load, index) for index, load in loads.items())
        if _bound_s(list(readers.values()), busy_s) >= under_s:
            return None
        if buffers is None:
            buffers = dict(zip(readers, best_buffers(list(readers.values()), busy_s), strict=True))
        buffers = _possible(loads, buffers)
        self.work.n_steps += len(visits)
        about_s = timing.about_s(visits, loads, buffers)
        if rival is not None and about_s > _SLACK * rival.about_s:
            return None
        cost = timing.pass_cost(visits, loads, buffers)
        self.work.n_steps += PASSES * sum(len(visit.layers) for visit in cost.visits)
        time_s = simulate(cost, timing.disks(buffers)).pass_s
        return Trial(way, time_s, about_s, buffers, self.output) if time_s < under_s else None

    # ------------------------------------------------------------ several steps on their way

    def _of_many(
        self, way: Way, visits: Sequence[Turn], rival: Trial | None, buffers: Mapping[int, int] | None
    ) -> Trial | None:
        """Where all weights stay, steps follow each other; where some are read, they become one."""
        loads = self.memory.loads(way)
        if loads is None or loads:
            return None if loads is None else self._in_turn(way, visits, rival, buffers)
        width = self.cluster.problem.width
        n_steps = n_steps_of(width, len(visits) + 1, streams=False)
        each = -(-width // n_steps)
        timing = self.timing(self.cluster.step.of(each, each))
        computing = timing.computing(visits)
        busy_s = sum(computing.values()) + timing.links_s(visits)
        time_s = busy_s if n_steps == 1 else max(busy_s, n_steps * timing.slowest_s(visits, computing))
        return Trial(way, time_s, time_s, {}, self.output) if rival is None or time_s < rival.time_s * _GAIN else None

    def _of_prompt(
        self, way: Way, visits: Sequence[Turn], rival: Trial | None, buffers: Mapping[int, int] | None
    ) -> Trial | None:
        under_s = rival.time_s * _GAIN if rival is not None else float("inf")
        loads = self.memory.loads(way)
        if loads is None:
            return None
        gathered = self._gathered(loads)
        chunk = self._chunk(way, visits, gathered)
        n_chunks, timing = -(-self.cluster.problem.n_prompt // chunk), self.timing(self.cluster.step.of(chunk, 1))
        computing = timing.computing(visits)
        least_s = sum(computing.values()) + timing.links_s(visits)
        one_at_a_time = any(sum(index == own for own, _ in visits) > 1 for index in loads)
        if one_at_a_time:
            least_s *= n_chunks
        else:
            least_s += (n_chunks - 1) * timing.slowest_s(visits, computing)
        if least_s >= under_s or not loads:
            return Trial(way, least_s, least_s, {}, self.output) if least_s < under_s else None
        buffers = _possible(loads, buffers or {})
        cost = timing.pass_cost(visits, loads, buffers)
        self.work.n_steps += (PASSES if one_at_a_time else 1) * sum(len(visit.layers) for visit in cost.visits)
        n_together = max(1, gathered // chunk)
        time_s = prompt_s(cost, timing.disks(buffers), n_chunks, n_together, one_at_a_time)
        return Trial(way, time_s, time_s, buffers, self.output) if time_s < under_s else None

    def _gathered(self, loads: Mapping[int, Load]) -> int:
        problem = self.cluster.problem
        names = [self.cluster.members[index].name for index in loads]
        return gathered_tokens(gather_bytes(problem, names), problem.model.row_bytes) if loads else 0

    def _chunk(self, way: Way, visits: Sequence[Turn], gathered: int) -> int:
        """As `chunk_of` has it."""
        problem, used = self.cluster.problem, {self.cluster.end.number, self.cluster.output.number, *way}
        on_gpu = any(not is_cpu(self.cluster.places[number].id) for number in used)
        is_alone = len({index for index, _ in visits}) == 1
        return min(problem.chunk or usual_chunk(on_gpu, is_alone, gathered), problem.n_prompt)


def _possible(loads: Mapping[int, Load], buffers: Mapping[int, int]) -> dict[int, int]:
    """As wanted, as far as they can be; the smallest where nothing is wanted."""
    return {
        index: max(min(buffers.get(index, 0), load.overload.most_buffer), load.smallest)
        for index, load in loads.items()
    }


def _bound_s(readers: Sequence[Reader], busy_s: float) -> float:
    """No buffers do better: all that a buffer can hide is hidden, or the least is read."""
    stalls = sum(reader.stall_s(reader.most_bytes) for reader in readers)
    return max(busy_s + stalls, *(reader.read_s(reader.least_bytes) for reader in readers))


@dataclass(slots=True)
class Judges:
    """One for each node that may have the output part; `outputs`: the head, if it may, before the others."""

    base: Judge
    outputs: tuple[int, ...]
    _others: dict[int, Judge] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem) -> Judges:
        base = Judge(Cluster.of(problem))
        numbers = {member.name: member.index for member in base.cluster.members}
        return cls(base, tuple(numbers[name] for name in problem.outputs))

    @property
    def work(self) -> Work:
        return self.base.work

    def __getitem__(self, output: int) -> Judge:
        if output == self.base.output:
            return self.base
        if output not in self._others:
            self._others[output] = Judge(self.base.cluster.with_output(output), self.work)
        return self._others[output]

    def clusters(self, step: Step) -> list[Cluster]:
        """Of all, with what such steps cost."""
        return [self[output].timing(step).cluster for output in self.outputs]
