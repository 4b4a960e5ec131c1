"""Why a problem has no plan: what is lacking, and the smallest cure of each kind that was found."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import KvType
from prima_core.plan.check import complete
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan
from prima_core.plan.problem import NodeFacts, Problem
from prima_core.plan.proportional import proportional
from prima_halda.cluster import outputs_of

_MOST_BYTES = 1 << 40
"""More memory than that is no cure."""
_MOST_S = 3600.0
_NEAR = 1.01
"""A cure is the smallest but for so much."""


def explained(problem: Problem, error: PlanError) -> PlanError:
    """The error, with what would help. Cures are tried with layers in proportion to memory, so that a little less may
    do; that they help is sure."""
    bare = _without_rates(problem)
    cures = [cure for find in (_memory, _streaming, _kv_type, _context) if (cure := find(bare))]
    elsewhere = "; with the output part on another node it does not fit either" if len(outputs_of(problem)) > 1 else ""
    return PlanError(f"{error.message}{elsewhere}", hint="; or ".join(cures) if cures else error.hint)


def shared_out(problem: Problem) -> Plan:
    """As `even` has it, with the output part on the head or, where that cannot be, on the first node where it can.
    Raises PlanError with what would help."""
    errors = list[PlanError]()
    for name in outputs_of(problem):
        try:
            plan = proportional(problem.with_output(name))
            complete(plan, problem)
        except PlanError as error:
            errors.append(error)
        else:
            return plan
    raise explained(problem, errors[0]) from errors[0]


def check_layers(problem: Problem) -> None:
    """Raises PlanError for a model without layers."""
    if not problem.model.n_layers:
        raise PlanError(f"{problem.model.name} has no layers", hint="layer_bytes is to have a size for each of them")


def check_use(forecast: Forecast) -> None:
    """Raises PlanError where the best plan that was found is foretold to take longer than anybody waits for a token."""
    if forecast.token_s <= _MOST_S:
        return
    raise PlanError(
        f"no plan is of any use: the best takes {forecast.token_s / 3600:,.1f} hours per token, most of it"
        f" {forecast.limit}",
        hint=f"that would have to be {forecast.token_s:,.0f} times faster for a token in a second: see that its rate is"
        " what the problem says",
    )


def _without_rates(problem: Problem) -> Problem:
    """So that no time goes into choosing what is fast."""
    nodes = tuple(msgspec.structs.replace(node, disk_bytes_s=0.0) for node in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes, rounds=0)


def _can_be(problem: Problem) -> bool:
    """With the output part on the head, or of the others where there is most room."""
    head, *others = outputs_of(problem)
    roomy = sorted(others, key=lambda name: -problem.node(name).room_bytes)[:1]
    return any(_can_be_with(problem.with_output(name)) for name in (head, *roomy))


def _can_be_with(problem: Problem) -> bool:
    try:
        complete(proportional(problem), problem)
    except PlanError:
        return False
    return True


# ---------------------------------------------------------------- cures


def _memory(problem: Problem) -> str:
    """On which node the least would do."""
    needs = {node.name: _least_more(problem, node) for node in problem.nodes}
    possible = {name: n_bytes for name, n_bytes in needs.items() if n_bytes is not None}
    if not possible:
        return ""
    name = min(possible, key=lambda name: possible[name])
    return f"let {name} use {possible[name] / 1e9:.3g} GB more of memory"


def _least_more(problem: Problem, node: NodeFacts) -> int | None:
    def helps(n_bytes: int) -> bool:
        nodes = tuple(_with_more(other, n_bytes) if other is node else other for other in problem.nodes)
        return _can_be(msgspec.structs.replace(problem, nodes=nodes))

    return _least(helps, 1 << 20)


def _with_more(node: NodeFacts, n_bytes: int) -> NodeFacts:
    devices = tuple(
        msgspec.structs.replace(device, memory_bytes=device.memory_bytes + n_bytes) if device.shares_host else device
        for device in node.devices
    )
    return msgspec.structs.replace(node, memory_bytes=node.memory_bytes + n_bytes, devices=devices)


def _least(helps: Callable[[int], bool], first: int) -> int | None:
    """The least number that helps, about, when all larger ones do."""
    low, high = 0, first
    while not helps(high):
        low, high = high, 4 * high
        if high > _MOST_BYTES:
            return None
    while high > _NEAR * low + first:
        middle = (low + high) // 2
        low, high = (low, middle) if helps(middle) else (middle, high)
    return high


def _streaming(problem: Problem) -> str:
    if problem.streaming or not _can_be(msgspec.structs.replace(problem, streaming=True)):
        return ""
    return "let weights that do not fit be read from disk for every token"


def _kv_type(problem: Problem) -> str:
    """A byte and its share of a scale, instead of two bytes."""
    model = problem.model
    smaller = msgspec.structs.replace(model, kv_bytes_per_token_layer=model.kv_bytes_per_token_layer * 17 // 32)
    if model.kv_type is not KvType.F16 or not _can_be(msgspec.structs.replace(problem, model=smaller)):
        return ""
    return "--kv-type q8_0"


def _context(problem: Problem) -> str:
    def can_be(n_tokens: int) -> bool:
        return _can_be(msgspec.structs.replace(problem, kv_tokens=n_tokens))

    if problem.kv_tokens <= 1 or not can_be(1):
        return ""
    low, high = 1, problem.kv_tokens
    while high > _NEAR * low + 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can_be(middle) else (low, middle)
    return f"keep {low} positions of KV instead of {problem.kv_tokens} (-c, --parallel)"
