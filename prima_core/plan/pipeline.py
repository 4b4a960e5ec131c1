"""Several steps on their way at once: chunks of a prompt, and tokens of many sequences. Formulas.

Each step goes from node to node, so steps follow each other as fast as the slowest stage takes one: a node, in all of
its visits, or the links to a node. A node that streams runs steps that wait for it together, as one, and reads its
weights once for them: see `ring/gather.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from prima_core.plan.costs import PassCost
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.plan.simulate import Disk, simulate

CPU_CHUNK, LONE_CPU_CHUNK, GPU_CHUNK = 64, 128, 512


def chunk_tokens(plan: Plan, row_bytes: int) -> int:
    """Tokens of a prompt in a step of a completed plan: more where a GPU computes, which unpacks its matrices for each
    chunk. On a CPU longer ones gain less, and hold others up; where nodes take turns, short ones keep all of them busy.
    Where weights come from disk, as many as the plan gathers for one reading of them, each of `row_bytes`."""
    on_gpu = any(not is_cpu(need.device) for need in plan.residency)
    is_alone = len({visit.node for visit in plan.visits}) == 1
    streams = any(need.buffer_bytes for need in plan.residency)
    return usual_chunk(on_gpu, is_alone, gathered_tokens(plan.gather_bytes, row_bytes) if streams else 0)


def usual_chunk(on_gpu: bool, is_alone: bool, gathered: int) -> int:
    return max(GPU_CHUNK if on_gpu else LONE_CPU_CHUNK if is_alone else CPU_CHUNK, min(GPU_CHUNK, gathered))


def gathered_tokens(gather_bytes: int, row_bytes: int) -> int:
    return gather_bytes // row_bytes if row_bytes else 0


def is_cpu(device: str) -> bool:
    """By its id; where none is told, of a node without devices, it is."""
    return not device or any(part.startswith("cpu") for part in device.split(":"))


def chunk_of(plan: Plan, problem: Problem) -> int:
    """As the problem says, else as `chunk_tokens`; not more than the prompt has."""
    return min(problem.chunk or chunk_tokens(plan, problem.model.row_bytes), problem.n_prompt)


def stages_s(cost: PassCost, disks: Mapping[str, Disk], reading: float = 1.0) -> dict[str, float]:
    """What a step takes each node and, by "links to NODE", the links to it. While a node computes it reads, this part
    of what it has to."""
    nodes = dict.fromkeys(visit.node for visit in cost.visits)
    own = {name: _node_s(name, cost, disks.get(name), reading) for name in nodes}
    return own | {f"links to {name}": cost.hop_s(name) for name in nodes}


def _node_s(name: str, cost: PassCost, disk: Disk | None, reading: float) -> float:
    compute_s = cost.compute_s(name)
    if disk is None:
        return compute_s
    read_s = max(compute_s, reading * cost.streamed_bytes(name) / disk.bytes_s)
    return read_s + disk.demanded_s(cost.demanded_bytes(name))


def prompt_s(cost: PassCost, disks: Mapping[str, Disk], n_chunks: int, n_together: int, one_at_a_time: bool) -> float:
    """Seconds of `n_chunks` steps that each cost the same; where one goes round at a time, each waits for the one
    before. Weights are read once for `n_together` of them, for the first at the latest."""
    if one_at_a_time:
        return n_chunks * simulate(cost, disks).pass_s
    further_s = max(stages_s(cost, disks, reading_of_further(n_chunks, n_together)).values())
    return sum(stages_s(cost, disks).values()) + (n_chunks - 1) * further_s


def reading_of_further(n_chunks: int, n_together: int) -> float:
    """How much of the weights each chunk but the first reads, on the average."""
    return (-(-n_chunks // n_together) - 1) / max(1, n_chunks - 1)


def n_steps_of(width: int, credit: int, streams: bool) -> int:
    """Steps that `width` sequences are served in. Where a node streams they meet there, and go on as one."""
    return 1 if streams else min(width, credit)


def cycle_s(cost: PassCost, n_steps: int) -> float:
    """Seconds in which each of `n_steps` that follow each other goes round once, where nothing is read."""
    return max(cost.busy_s, n_steps * max(stages_s(cost, {}).values()))
