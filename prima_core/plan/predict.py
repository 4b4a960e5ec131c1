"""What a completed plan will do: time per token, tokens of all sequences together, time to the first one, and what each
node reads, waits and holds."""

from __future__ import annotations

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.costs import PassCost, missing_rate, pass_cost
from prima_core.plan.forecast import Forecast, NodeForecast
from prima_core.plan.overlap import Reader, pass_s, reading_s
from prima_core.plan.pipeline import chunk_of, cycle_s, gathered_tokens, n_steps_of, prompt_s, stages_s
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Simulated, disks_of, simulate
from prima_core.plan.stream import n_turns


def predict(
    plan: Plan, problem: Problem, width: int | None = None, n_prompt: int | None = None, chunk: int | None = None
) -> Forecast:
    """`width`, `n_prompt` and `chunk`: other ones than the problem's.

    `plan` is a completed one. Raises PlanError for one that is not, or where a rate that it depends on is not known.
    """
    if not plan.residency:
        raise PlanError("only a completed plan can be foretold", hint="`complete` it first")
    asked = msgspec.structs.replace(
        problem,
        width=width or problem.width,
        n_prompt=n_prompt or problem.n_prompt,
        chunk=problem.chunk if chunk is None else chunk,
    )
    n_steps = steps_of(plan, asked)
    each, size = -(-asked.width // n_steps), chunk_of(plan, asked)
    missing = missing_rate(plan, asked, size if asked.goal is Goal.TTFT else each)
    if missing:
        raise PlanError(f"no forecast: {missing} is not known", hint="state it in the problem")
    cost = pass_cost(plan, asked, each, rows=each)
    simulated = simulate(cost, disks_of(plan, asked))
    token_s = simulated.pass_s if n_steps == 1 else cycle_s(cost, n_steps)
    readers, buffers = _readers(plan, asked, cost)
    least_s = pass_s(readers, buffers, cost.busy_s + _demanded_s(cost, plan, asked))
    return Forecast(
        token_s=token_s,
        bound_s=least_s if n_steps == 1 else token_s,
        prompt_s=None if missing_rate(plan, asked, size) else _prompt_s(plan, asked, size),
        n_prompt=asked.n_prompt,
        width=asked.width,
        limit=_limit(cost, simulated, reading_s(readers, buffers), n_steps),
        nodes=tuple(_node(name, plan, cost, simulated, n_steps) for name in plan.nodes),
        tokens_s=asked.width / token_s if token_s else 0.0,
    )


def goal_s(forecast: Forecast, goal: Goal) -> float:
    """What is to be least. Raises PlanError where it was not foretold."""
    if goal is not Goal.TTFT:
        return forecast.token_s
    if forecast.prompt_s is None:
        raise PlanError("no time to the first token: rates of prefill are not known", hint="state prefill_bytes_s")
    return forecast.prompt_s


def steps_of(plan: Plan, problem: Problem) -> int:
    """Steps in which a token of each of the problem's sequences is computed."""
    if problem.goal is not Goal.THROUGHPUT:
        return 1
    return n_steps_of(problem.width, plan.credit, any(need.buffer_bytes for need in plan.residency))


def _node(name: str, plan: Plan, cost: PassCost, simulated: Simulated, n_steps: int) -> NodeForecast:
    needs = [need for need in plan.residency if need.node == name]
    return NodeForecast(
        node=name,
        compute_s=n_steps * cost.compute_s(name),
        stall_s=simulated.stall_s.get(name, 0.0),
        link_s=n_steps * cost.hop_s(name),
        read_bytes=round(simulated.read_bytes.get(name, 0.0)),
        pinned_bytes=sum(need.pinned_bytes + need.host_bytes for need in needs),
        buffer_bytes=sum(need.buffer_bytes for need in needs),
        kv_bytes=sum(need.kv_bytes for need in needs),
    )


def _limit(cost: PassCost, simulated: Simulated, reading: float, n_steps: int) -> str:
    """In words."""
    stages = stages_s(cost, {})
    busiest = max(stages, key=lambda name: stages[name])
    if n_steps > 1 and n_steps * stages[busiest] > cost.busy_s:
        return f"the {busiest}" if busiest.startswith("links to ") else f"computing on {busiest}"
    slowest = max(simulated.stall_s, key=lambda name: simulated.stall_s[name], default="")
    link_s = sum(visit.hop_s for visit in cost.visits)
    shares = {
        "computing": cost.busy_s - link_s,
        "links": link_s,
        f"the disk of {slowest}": sum(simulated.stall_s.values()),
    }
    if simulated.stall_s and reading >= 0.95 * simulated.pass_s:
        return f"the disk of {slowest}, which is always busy"
    return max(shares, key=lambda what: shares[what])


def _readers(plan: Plan, problem: Problem, cost: PassCost) -> tuple[list[Reader], list[float]]:
    """For the formulas, with their buffers."""
    readers: list[Reader] = []
    buffers: list[float] = []
    for name, disk in disks_of(plan, problem).items():
        read = cost.streamed_bytes(name)
        size = min(float(disk.buffer_bytes), read)
        over = round(read - size)
        readers.append(Reader(over, n_turns(plan, name), cost.compute_s(name), disk.bytes_s, disk=disk.name))
        buffers.append(size)
    return readers, buffers


def _demanded_s(cost: PassCost, plan: Plan, problem: Problem) -> float:
    return sum(disk.demanded_s(cost.demanded_bytes(name)) for name, disk in disks_of(plan, problem).items())


def _prompt_s(plan: Plan, problem: Problem, chunk: int) -> float:
    """A token of a prompt looks back on half of it, on the average."""
    cost = pass_cost(plan, problem, chunk, n_past=problem.n_prompt // 2)
    n_together = max(1, gathered_tokens(plan.gather_bytes, problem.model.row_bytes) // chunk)
    return prompt_s(cost, disks_of(plan, problem), -(-problem.n_prompt // chunk), n_together, plan.credit == 1)
