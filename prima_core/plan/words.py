"""A plan in plain sentences: who does what, what it takes, what limits it, who was left out, what would help."""

from __future__ import annotations

from collections.abc import Iterator

from prima_core.interfaces import Goal
from prima_core.plan.explanation import Explanation, LeftOut, WhatIf
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan

LITTLE = 0.01
"""A part of the time per token that is not worth a word."""
_NOTHING = 1e-4
"""A part that is as good as none."""
_CHANGES = {
    "memory": "1 GB more of memory on {}",
    "cable": "a cable to {} (1 Gbit/s, 0.3 ms)",
    "disk": "a disk twice as fast in {}",
}


WHAT = {Goal.LATENCY: "a token", Goal.THROUGHPUT: "a token of each", Goal.TTFT: "the first token"}


def summary(plan: Plan) -> str:
    """Of a completed plan, in a paragraph."""
    does = {name: f"{_layers(plan, name)}{_output(plan, name)}{_from_disk(plan, name)}" for name in plan.nodes}
    parts = "; ".join(f"{name} computes {part}" for name, part in does.items())
    return " ".join((f"{parts}.", *left_out(plan), *guesses(plan)))


def left_out(plan: Plan) -> list[str]:
    """Sentences for the nodes that compute nothing: one for each that was tried."""
    known = plan.explanation or Explanation()
    costs = [f"{_left_out(out, known)}." for out in known.left_out if out.time_s is not None]
    reasons = dict.fromkeys(out.why for out in known.left_out if out.time_s is None)
    names = {why: [out.node for out in known.left_out if out.time_s is None and out.why == why] for why in reasons}
    return [*costs, *(f"{_listed(own)} left out{f': {why}' if why else ''}." for why, own in names.items())]


def guesses(plan: Plan) -> list[str]:
    """Sentences for the rates that were not known."""
    return [f"{_capital(guess)}." for guess in (plan.explanation or Explanation()).guesses]


def told(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Of a completed plan: titles, each with its sentences."""
    known = plan.explanation or Explanation()
    yield "Who does what", [f"{_part(plan, name)}{_waits(plan, name)}." for name in plan.nodes]
    if known.left_out:
        yield "Who was left out", left_out(plan)
    if plan.forecast is not None:
        yield "How long it takes", [*_durations(plan.forecast, known.goal), *guesses(plan)]
    if known.time_s is None or not known.what_ifs:
        return
    if gains := list(_gains(known, known.time_s)):
        yield "What would help", gains
    if worths := list(_worths(known, known.time_s)):
        yield "What each is worth", worths


# ---------------------------------------------------------------- who does what


def _part(plan: Plan, name: str) -> str:
    n_visits = sum(visit.node == name for visit in plan.visits)
    visits = f" in {_count(n_visits, 'visit')}" if n_visits > 1 else ""
    head = " (the head)" if name == plan.head else ""
    needs = [need for need in plan.residency if need.node == name]
    kept, kv = sum(need.pinned_bytes for need in needs), sum(need.kv_bytes for need in needs)
    kept_too = f" and {size(kv)} of KV" if kv else ""
    host = sum(need.host_bytes for need in needs)
    copies = f", copies {size(host)} from the host's for every token" if host else ""
    keeps = f"it keeps {size(kept) if kept else 'nothing'} of weights{kept_too} in memory{copies}"
    part = f"{_layers(plan, name)}{visits}{_devices(plan, name)}{_output(plan, name)}"
    return f"{name}{head} computes {part}; {keeps}{_from_disk(plan, name)}"


def _layers(plan: Plan, name: str) -> str:
    n_layers = sum(map(len, plan.layers_of(name)))
    if not n_layers:
        return "the output only" if name == plan.output_node else "the input only"
    return f"{n_layers} of {_count(plan.n_layers, 'layer')} ({_percent(n_layers / plan.n_layers)})"


def _output(plan: Plan, name: str) -> str:
    """Where it is not on the head, which is not worth a word."""
    return ", and the output" if name == plan.output and plan.layers_of(name) else ""


def _devices(plan: Plan, name: str) -> str:
    """Where there are several."""
    counts: dict[str, int] = {}
    for part in (part for visit in plan.visits if visit.node == name for part in visit.split):
        counts[part.device] = counts.get(part.device, 0) + len(part.layers)
    parts = [f"{count} on {device}" for device, count in counts.items()]
    return f": {', '.join(parts)}" if len(parts) > 1 else ""


def _from_disk(plan: Plan, name: str) -> str:
    """What a token makes it read: of experts fewer, where that was foretold."""
    on_disk = sum(need.disk_bytes for need in plan.residency if need.node == name and need.buffer_bytes)
    foretold = [] if plan.forecast is None else [one.read_bytes for one in plan.forecast.nodes if one.node == name]
    read = foretold[0] if foretold else on_disk
    return f" and reads {size(read)} from disk for every token" if read else ""


def _waits(plan: Plan, name: str) -> str:
    """For what it reads, where that was foretold."""
    forecast = plan.forecast
    part = next((one for one in forecast.nodes if one.node == name and one.read_bytes), None) if forecast else None
    if forecast is None or part is None:
        return ""
    if part.stall_s > LITTLE * forecast.token_s:
        return f", and waits {duration(part.stall_s)} for that"
    return ", hidden behind the others' work" if len(plan.nodes) > 1 else ", hidden behind its own work"


def _left_out(out: LeftOut, known: Explanation) -> str:
    what, more_s = WHAT[known.goal], (out.time_s or 0.0) - (known.time_s or 0.0)
    if abs(more_s) <= _NOTHING * (known.time_s or 0.0):
        return f"{out.node} was left out, as with it {what} would take just as long"
    if more_s < 0:
        return f"{out.node} was left out, though with it {what} would take {duration(-more_s)} less"
    why = f": {out.why}" if out.why else ""
    return f"{out.node} was left out, as with it {what} would take {duration(more_s)} longer{why}"


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last} were" if most else f"{last} was"


# ---------------------------------------------------------------- how long


def _durations(forecast: Forecast, goal: Goal) -> Iterator[str]:
    token = f"A token takes {duration(forecast.token_s)}, {forecast.tokens_s:.3g} tokens a second"
    if forecast.width > 1:
        token = f"{_headline(forecast, Goal.THROUGHPUT)}: a token of each takes {duration(forecast.token_s)}"
    first = f"The first token after a prompt of {forecast.n_prompt} comes after {duration(forecast.prompt_s or 0.0)}."
    firsts = [first] if forecast.prompt_s is not None else []
    said = [f"{_capital(token)}{_shares(forecast, goal)}.", *firsts]
    yield from reversed(said) if goal is Goal.TTFT else said
    yield f"What limits it most: {forecast.limit}."


def headline(plan: Plan) -> str:
    """What the plan is for, as it was foretold, in a few words: of a plan with a forecast and an explanation."""
    known = plan.explanation or Explanation()
    return _headline(plan.forecast, known.goal) if plan.forecast is not None else ""


def _headline(forecast: Forecast, goal: Goal) -> str:
    if goal is Goal.THROUGHPUT:
        return f"{forecast.tokens_s:.3g} tokens a second in {_count(forecast.width, 'sequence')}"
    if goal is Goal.TTFT and forecast.prompt_s is not None:
        return f"the first token after {duration(forecast.prompt_s)}"
    return f"{'a token' if forecast.width == 1 else f'{forecast.width} tokens'} in {duration(forecast.token_s)}"


def _shares(forecast: Forecast, goal: Goal) -> str:
    """Where one step goes round at a time, so that times add up."""
    if goal is Goal.THROUGHPUT:
        return ""
    shares = ((what, time_s) for what, time_s in forecast.shares_s.items() if time_s > LITTLE * forecast.token_s)
    parts = (f"{what} {duration(time_s)} ({_percent(time_s / forecast.token_s)})" for what, time_s in shares)
    return f": {', '.join(parts)}"


def _gains(known: Explanation, time_s: float) -> Iterator[str]:
    """The largest first, and at last what is not worth it."""
    changes = [one for one in known.what_ifs if one.change != "without"]
    gains = sorted(((time_s - (one.time_s or time_s), one) for one in changes), key=lambda gain: -gain[0])
    for gain_s, one in gains:
        if gain_s > LITTLE * time_s:
            gain = f"{duration(gain_s)} less for {WHAT[known.goal]} ({_percent(gain_s / time_s)})"
            yield f"{_capital(_changed(one))}: {'at least ' if one.is_estimate else ''}{gain}."
    for is_estimate, where in ((False, ""), (True, ", as long as the layers stay where they are")):
        little = [
            _changed(one) for gain_s, one in gains if gain_s <= LITTLE * time_s and one.is_estimate is is_estimate
        ]
        if little:
            yield f"Nothing to speak of{where}: {'; '.join(little)}."
    if known.n_untried:
        yield f"{_count(known.n_untried, 'change')} that promised less were not worked out."
    if any(one.is_estimate for one in changes):
        yield "So large a cluster is not planned anew for each change: with the layers elsewhere some may give more."


def _worths(known: Explanation, time_s: float) -> Iterator[str]:
    withouts = [one for one in known.what_ifs if one.change == "without"]
    yield from (_without(one, time_s, known.goal) for one in withouts if not one.is_estimate)
    if names := [one.node for one in withouts if one.is_estimate]:
        *most, last = names
        listed = f"{', '.join(most)} or {last}" if most else last
        yield f"Without {listed}: not worked out, as that takes a plan of its own."


def _changed(what_if: WhatIf) -> str:
    return _CHANGES[what_if.change].format(what_if.node)


def _without(one: WhatIf, time_s: float, goal: Goal) -> str:
    if one.time_s is None:
        return f"Without {one.node} there would be no plan."
    what, more_s = WHAT[goal], one.time_s - time_s
    if abs(more_s) <= LITTLE * time_s:
        return f"Without {one.node} {what} would take about as long."
    by = f"{duration(abs(more_s))} {'longer' if more_s > 0 else 'less'}"
    return f"Without {one.node} {what} would take {by} ({duration(one.time_s)})."


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


def _capital(sentence: str) -> str:
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
