"""A plan in plain sentences: who does what, what it takes, what limits it, who was left out, what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prima_core.plan.explanation import Explanation, LeftOut, WhatIf
from prima_core.plan.forecast import Forecast, NodeForecast
from prima_core.plan.plan import Plan

LITTLE = 0.01
"""A part of the time per token that is not worth a word."""
_CHANGES = {
    "memory": "1 GB more of memory on {}",
    "cable": "a cable to {} (1 Gbit/s, 0.3 ms)",
    "disk": "a disk twice as fast in {}",
}


def summary(plan: Plan) -> str:
    """Of a completed plan, in a paragraph."""
    parts = [f"{name} computes {_layers(plan, name)}{_from_disk(plan, name)}" for name in plan.nodes]
    outs = [] if plan.explanation is None else [_left_out(out, plan.forecast) for out in plan.explanation.left_out]
    return " ".join(f"{sentence}." for sentence in ("; ".join(parts), *outs))


def told(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Of a completed plan: titles, each with its sentences."""
    forecast, explanation = plan.forecast, plan.explanation or Explanation()
    parts = {} if forecast is None else {node.node: node for node in forecast.nodes}
    yield "Who does what", [f"{_part(plan, name)}{_times(parts.get(name), plan)}." for name in plan.nodes]
    if explanation.left_out:
        yield "Who was left out", [f"{_left_out(out, forecast)}." for out in explanation.left_out]
    if forecast is None:
        return
    yield "How long it takes", list(_durations(forecast))
    helps = [one for one in explanation.what_ifs if one.change != "without"]
    if helps:
        yield "What would help", list(_gains(helps, forecast, explanation.n_untried))
    withouts = [_without(one, forecast) for one in explanation.what_ifs if one.change == "without"]
    if withouts:
        yield "What each is worth", withouts


# ---------------------------------------------------------------- who does what


def _part(plan: Plan, name: str) -> str:
    n_visits = sum(visit.node == name for visit in plan.visits)
    visits = f" in {_count(n_visits, 'visit')}" if n_visits > 1 else ""
    head = " (the head)" if name == plan.head else ""
    needs = [need for need in plan.residency if need.node == name]
    kept, kv = sum(need.pinned_bytes for need in needs), sum(need.kv_bytes for need in needs)
    kept_too = f" and {size(kv)} of KV" if kv else ""
    keeps = f"it keeps {size(kept)} of weights{kept_too} in memory"
    return f"{name}{head} computes {_layers(plan, name)}{visits}{_devices(plan, name)}; {keeps}{_from_disk(plan, name)}"


def _layers(plan: Plan, name: str) -> str:
    n_layers = sum(map(len, plan.layers_of(name)))
    if not n_layers:
        return "the output only"
    return f"{n_layers} of {_count(plan.n_layers, 'layer')} ({_percent(n_layers / plan.n_layers)})"


def _devices(plan: Plan, name: str) -> str:
    """Where there are several."""
    counts: dict[str, int] = {}
    for part in (part for visit in plan.visits if visit.node == name for part in visit.split):
        counts[part.device] = counts.get(part.device, 0) + len(part.layers)
    parts = [f"{count} on {device}" for device, count in counts.items()]
    return f": {', '.join(parts)}" if len(parts) > 1 else ""


def _from_disk(plan: Plan, name: str) -> str:
    """What a token makes it read: of experts fewer, where that was foretold."""
    streamed = sum(need.streamed_bytes for need in plan.residency if need.node == name and need.buffer_bytes)
    foretold = [] if plan.forecast is None else [one.read_bytes for one in plan.forecast.nodes if one.node == name]
    read = foretold[0] if foretold else streamed
    return f" and reads {size(read)} from disk for every token" if read else ""


def _times(part: NodeForecast | None, plan: Plan) -> str:
    if part is None or plan.forecast is None or not part.read_bytes:
        return ""
    if part.stall_s > LITTLE * plan.forecast.token_s:
        return f", and waits {duration(part.stall_s)} for that"
    return ", hidden behind the others' work" if len(plan.nodes) > 1 else ", hidden behind its own work"


def _left_out(out: LeftOut, forecast: Forecast | None) -> str:
    if forecast is None or out.token_s is None:
        return f"{out.node} was left out" + (f": {out.why}" if out.why else "")
    more_s = out.token_s - forecast.token_s
    if more_s <= 0:
        return f"{out.node} was left out, though with it a token would take {duration(-more_s)} less"
    return f"{out.node} was left out: with it a token would take {duration(more_s)} longer ({out.why})"


# ---------------------------------------------------------------- how long


def _durations(forecast: Forecast) -> Iterator[str]:
    shares = {what: time_s for what, time_s in forecast.shares_s.items() if time_s > 0}
    parts = ", ".join(
        f"{what} {duration(time_s)} ({_percent(time_s / forecast.token_s)})" for what, time_s in shares.items()
    )
    yield f"A token takes {duration(forecast.token_s)}, {1 / forecast.token_s:.3g} tokens a second: {parts}."
    if forecast.prompt_s is not None:
        yield f"The first one after a prompt of {forecast.n_prompt} tokens comes after {duration(forecast.prompt_s)}."
    yield f"What limits it most: {forecast.limit}."


def _gains(what_ifs: Sequence[WhatIf], forecast: Forecast, n_untried: int) -> Iterator[str]:
    """The largest first, and at last what is not worth it."""
    gains = sorted(
        ((forecast.token_s - (one.token_s or forecast.token_s), one) for one in what_ifs), key=lambda gain: -gain[0]
    )
    for gain_s, one in gains:
        if gain_s > LITTLE * forecast.token_s:
            share = _percent(gain_s / forecast.token_s)
            yield f"{_changed(one)}: {duration(gain_s)} less per token ({share})."
    little = [_changed(one) for gain_s, one in gains if gain_s <= LITTLE * forecast.token_s]
    if little:
        yield f"Nothing to speak of: {'; '.join(little)}."
    if n_untried:
        yield f"{_count(n_untried, 'change')} that promised less were not tried."


def _changed(what_if: WhatIf) -> str:
    return _CHANGES[what_if.change].format(what_if.node)


def _without(what_if: WhatIf, forecast: Forecast) -> str:
    if what_if.token_s is None:
        return f"Without {what_if.node} there would be no plan."
    more_s = what_if.token_s - forecast.token_s
    if more_s <= LITTLE * forecast.token_s:
        return f"Without {what_if.node} a token would take about as long."
    return f"Without {what_if.node} a token would take {duration(more_s)} longer ({duration(what_if.token_s)})."


# ---------------------------------------------------------------- numbers


def duration(time_s: float) -> str:
    return f"{_three(time_s)} s" if time_s >= 1 else f"{_three(1e3 * time_s)} ms"


def size(n_bytes: float) -> str:
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= unit_bytes:
            return f"{_three(n_bytes / unit_bytes)} {unit}"
    return f"{n_bytes:.0f} B"


def _three(number: float) -> str:
    """Its first three digits, or all that are no fraction."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
