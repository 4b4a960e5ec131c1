"""A plan as pictures need it: what each node does when in a pass, and what lies in its memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prima_core.errors import PlanError
from prima_core.plan.costs import missing_rate, pass_cost
from prima_core.plan.plan import Plan
from prima_core.plan.predict import steps_of
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Span, disks_of, spans_of

_NEAR = 1e-9
"""Of a pass: what is so far apart follows without a pause."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What a node does in a pass: in `work` links, stalls and computing one after another, in `reading` its disk."""

    node: str
    work: tuple[Span, ...]
    reading: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """`lanes` in the order in which nodes come first in the pass, the head before them; `n_tokens` go through in it."""

    pass_s: float
    n_tokens: int
    lanes: tuple[Lane, ...]


def timeline(plan: Plan, problem: Problem) -> Timeline:
    """Of a completed plan, of a step as `predict` has it. Raises PlanError where a rate that it takes is not known, and
    where a step takes no time at all."""
    width = -(-problem.width // steps_of(plan, problem))
    missing = missing_rate(plan, problem, width)
    if missing:
        raise PlanError(f"no forecast: {missing} is not known", hint="state it in the problem")
    spans = spans_of(pass_cost(plan, problem, width, rows=width), disks_of(plan, problem))
    pass_s = max(span.stop_s for span in spans)
    if not pass_s:
        raise PlanError("a token takes no time at all", hint="state in the problem how large its layers are")
    return Timeline(pass_s, width, tuple(_lane(name, spans, pass_s) for name in plan.nodes))


def memory_parts(plan: Plan, name: str) -> dict[str, int]:
    """Bytes that a completed plan takes on a node."""
    needs = [need for need in plan.residency if need.node == name]
    return {
        "weights": sum(need.pinned_bytes + need.host_bytes for need in needs),
        "buffer": sum(need.buffer_bytes + need.slot_bytes for need in needs),
        "KV": sum(need.kv_bytes for need in needs),
    }


def _lane(name: str, spans: Iterable[Span], pass_s: float) -> Lane:
    own = [span for span in spans if span.node == name]
    work = [span for span in own if span.kind != "read"]
    reading = [span for span in own if span.kind == "read"]
    return Lane(name, _joined(work, _NEAR * pass_s), _joined(reading, _NEAR * pass_s))


def _joined(spans: Sequence[Span], near_s: float) -> tuple[Span, ...]:
    """Without those of no length; what goes on is one."""
    found: list[Span] = []
    for span in spans:
        if span.stop_s - span.start_s <= near_s:
            continue
        if found and found[-1].kind == span.kind and span.start_s - found[-1].stop_s <= near_s:
            found[-1] = replace(found[-1], stop_s=span.stop_s)
        else:
            found.append(span)
    return tuple(found)
