"""What a completed plan will do: time per token, time to the first one, what each node reads, waits and holds."""

from __future__ import annotations

from prima_core.errors import PlanError
from prima_core.plan.costs import PassCost, missing_rate, pass_cost
from prima_core.plan.forecast import Forecast, NodeForecast
from prima_core.plan.overlap import Reader, pass_s, reading_s
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Disk, Simulated, disks_of, simulate
from prima_core.plan.stream import n_turns

CHUNK_TOKENS = 128
PROMPT_TOKENS = 512


def predict(
    plan: Plan, problem: Problem, width: int = 1, n_prompt: int = PROMPT_TOKENS, chunk: int = CHUNK_TOKENS
) -> Forecast:
    """`width`: tokens that go through together, of as many sequences. `chunk`: tokens of a prompt in a step.

    `plan` is a completed one. Raises PlanError for one that is not, or where a rate that it depends on is not known.
    """
    if not plan.residency:
        raise PlanError("only a completed plan can be foretold", hint="`complete` it first")
    missing = missing_rate(plan, problem, width)
    if missing:
        raise PlanError(f"no forecast: {missing} is not known", hint="state it in the problem")
    cost = pass_cost(plan, problem, width, rows=width)
    simulated = simulate(cost, disks_of(plan, problem))
    readers, buffers = _readers(plan, problem, cost)
    return Forecast(
        token_s=simulated.pass_s,
        bound_s=pass_s(readers, buffers, cost.busy_s + _demanded_s(cost, plan, problem)),
        prompt_s=None if missing_rate(plan, problem, chunk) else _prompt_s(plan, problem, n_prompt, chunk),
        n_prompt=n_prompt,
        width=width,
        limit=_limit(cost, simulated, reading_s(readers, buffers)),
        nodes=tuple(_node(name, plan, cost, simulated) for name in plan.nodes),
    )


def _node(name: str, plan: Plan, cost: PassCost, simulated: Simulated) -> NodeForecast:
    needs = [need for need in plan.residency if need.node == name]
    return NodeForecast(
        node=name,
        compute_s=cost.compute_s(name),
        stall_s=simulated.stall_s.get(name, 0.0),
        link_s=cost.hop_s(name),
        read_bytes=round(simulated.read_bytes.get(name, 0.0)),
        pinned_bytes=sum(need.pinned_bytes for need in needs),
        buffer_bytes=sum(need.buffer_bytes for need in needs),
        kv_bytes=sum(need.kv_bytes for need in needs),
    )


def _limit(cost: PassCost, simulated: Simulated, reading: float) -> str:
    """In words."""
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
    return sum(cost.demanded_bytes(name) / disk.bytes_s for name, disk in disks_of(plan, problem).items())


def _prompt_s(plan: Plan, problem: Problem, n_prompt: int, chunk: int) -> float:
    """The chunks follow each other from node to node, as fast as the slowest of these takes one; where one step goes
    round at a time, each waits for the one before. A node computes a chunk while it reads for it."""
    chunk = min(chunk, n_prompt)
    cost, n_chunks = pass_cost(plan, problem, chunk), -(-n_prompt // chunk)
    if plan.credit == 1:
        return n_chunks * simulate(cost, disks_of(plan, problem)).pass_s
    disks = disks_of(plan, problem)
    stages = [cost.hop_s(name) + _stage_s(name, cost, disks.get(name)) for name in plan.nodes]
    return sum(stages) + (n_chunks - 1) * max(stages)


def _stage_s(name: str, cost: PassCost, disk: Disk | None) -> float:
    compute_s = cost.compute_s(name)
    if disk is None:
        return compute_s
    return max(compute_s, cost.streamed_bytes(name) / disk.bytes_s) + cost.demanded_bytes(name) / disk.bytes_s
