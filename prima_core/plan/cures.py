"""Why a problem has no plan: the smallest cure of each kind that was found. Work is counted, so that a large cluster
does not wait for it, and the same problem has the same cures on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import KvType
from prima_core.plan.check import complete
from prima_core.plan.problem import NodeFacts, Problem
from prima_core.plan.proportional import proportional

MOST_CELLS = 400_000
"""Layers times nodes that are laid out at most, in all trials together: about a second."""
_MOST_BYTES = 1 << 40
"""More memory than that is no cure."""
_NEAR = 1.01
"""A cure is the smallest but for so much."""
_LEAST_BYTES = 1 << 20
_Q8_SHARE = 17 / 32
"""Of f16: a byte and its share of a scale, instead of two bytes."""


def with_cures(problem: Problem, error: PlanError) -> PlanError:
    """The error of a solver that found no plan, with what would help. Cures are tried with layers in proportion to
    memory, so that a little less may do; that they help is sure. Where such a plan is possible, it is not room that
    lacks, and the error stays as it is."""
    trials, bare = _Trials(), _without_rates(problem)
    has_head = any(node.name == problem.head for node in problem.nodes)
    if not (has_head and problem.model.n_layers) or trials.can_be(bare):
        return error
    cures = list(_cures(bare, trials))
    return PlanError(error.message, hint="; or ".join(cures)) if cures else error


def _cures(problem: Problem, trials: _Trials) -> Iterator[str]:
    """Memory is told first, and looked for last, as that takes most work."""
    others = [cure for find in (_streaming, _kv_type, _context) if (cure := find(problem, trials))]
    if more := _memory(problem, trials):
        yield more
    yield from others


def _without_rates(problem: Problem) -> Problem:
    """So that no time goes into choosing what is fast."""
    nodes = tuple(msgspec.structs.replace(node, disk_bytes_s=0.0) for node in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes, rounds=0)


@dataclass(slots=True)
class _Trials:
    """Whether problems have a plan, until the work is done: from then on none has, as far as is known."""

    n_cells: int = 0

    def can_be(self, problem: Problem) -> bool:
        """With the output part on the head, or of the others where there is most room."""
        first, *others = problem.outputs
        roomy = sorted(others, key=lambda name: -problem.node(name).room_bytes)[:1]
        return any(self._can_be(problem.with_output(name)) for name in (first, *roomy))

    def _can_be(self, problem: Problem) -> bool:
        if self.n_cells >= MOST_CELLS:
            return False
        self.n_cells += problem.model.n_layers * len(problem.nodes)
        try:
            complete(proportional(problem), problem)
        except PlanError:
            return False
        return True


def _memory(problem: Problem, trials: _Trials) -> str:
    """On which node the least would do; all are asked whether they would do with less than the best so far."""
    best: tuple[int, str] | None = None
    for node in problem.nodes:

        def helps(n_bytes: int, node: NodeFacts = node) -> bool:
            return trials.can_be(_with_more(problem, node, n_bytes))

        if best is None:
            n_bytes = _least(helps, min(_lacking(problem), _MOST_BYTES), _MOST_BYTES)
        else:
            less = round(best[0] / _NEAR) - _LEAST_BYTES
            n_bytes = _least(helps, less, less) if less > 0 else None
        best = best if n_bytes is None else (n_bytes, node.name)
    return f"let {best[1]} use {best[0] / 1e9:.3g} GB more of memory" if best else ""


def _lacking(problem: Problem) -> int:
    """What the nodes have too little of in all, about; of weights that are read from disk nothing has to stay."""
    if problem.streaming:
        return _LEAST_BYTES
    needed = problem.layers_bytes(0, problem.model.n_layers) + problem.fixed_bytes(problem.head)
    return max(_LEAST_BYTES, needed - sum(node.room_bytes for node in problem.nodes))


def _with_more(problem: Problem, small: NodeFacts, n_bytes: int) -> Problem:
    devices = tuple(
        msgspec.structs.replace(device, memory_bytes=device.memory_bytes + n_bytes) if device.shares_host else device
        for device in small.devices
    )
    larger = msgspec.structs.replace(small, memory_bytes=small.memory_bytes + n_bytes, devices=devices)
    return msgspec.structs.replace(problem, nodes=tuple(larger if one is small else one for one in problem.nodes))


def _least(helps: Callable[[int], bool], first: int, most: int) -> int | None:
    """The least number that helps, about, when all larger ones do; `first`: a guess. None: not even `most` does."""
    low, high = 0, first
    while not helps(high):
        if high >= most:
            return None
        low, high = high, min(most, 4 * high)
    while high > _NEAR * low + _LEAST_BYTES:
        middle = (low + high) // 2
        low, high = (low, middle) if helps(middle) else (middle, high)
    return high


def _streaming(problem: Problem, trials: _Trials) -> str:
    if problem.streaming or not trials.can_be(msgspec.structs.replace(problem, streaming=True)):
        return ""
    return "let weights that do not fit be read from disk for every token"


def _kv_type(problem: Problem, trials: _Trials) -> str:
    model = problem.model
    smaller = msgspec.structs.replace(model, kv_bytes_per_token_layer=round(model.kv_bytes_per_token_layer * _Q8_SHARE))
    if model.kv_type is not KvType.F16 or not trials.can_be(msgspec.structs.replace(problem, model=smaller)):
        return ""
    return "--kv-type q8_0"


def _context(problem: Problem, trials: _Trials) -> str:
    def can_be(n_tokens: int) -> bool:
        return trials.can_be(msgspec.structs.replace(problem, kv_tokens=n_tokens))

    if problem.kv_tokens <= 1 or not can_be(1):
        return ""
    low, high = 1, problem.kv_tokens
    while high > _NEAR * low + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can_be(middle) else (low, middle)
    return f"keep {low} positions of KV instead of {problem.kv_tokens} (-c, --parallel)"
