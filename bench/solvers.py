"""How good and how quick solvers are: `python -m bench.solvers [small|large|all]`.

small: `halda` against the best of all plans for random small clusters, in simulated time per token.
large: seconds that it takes, and the plans of the other solvers under the same simulation.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Iterator

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_halda import compute, solver
from prima_halda.cluster import Cluster
from prima_halda.improve import Budget, with_better_buffers
from prima_halda.judge import Judge, Trial
from prima_halda.solver import _fastest

MB = 1_000_000
N_WAYS = 70_000
"""Problems have at most so many ways to lay layers on places."""
NEAR = 1.15
"""Ways that take so many times as long as the best one get a search for better buffers."""


def small_problem(seed: int) -> Problem:
    """2 to 4 nodes, up to 8 layers; memory from too little to plenty, some GPUs, some slow links, some shared disks."""
    chance = random.Random(f"small {seed}")
    n_nodes = chance.randint(2, 4)
    has_gpu = [chance.random() < 0.25 for _ in range(n_nodes)]
    n_places = n_nodes + sum(has_gpu)
    most = max(n for n in range(2, 9) if n_places**n <= N_WAYS)
    usual = chance.randint(60, 600) * MB
    odd = chance.random() < 0.4
    layers = tuple(int(usual * (chance.uniform(0.7, 1.4) if odd else 1)) for _ in range(chance.randint(2, most)))
    ends = chance.choice((0, usual // 2, usual))
    model = ModelFacts(
        "small",
        layers,
        ends // 2,
        ends,
        1000,
        4096,
        largest_tensor_bytes=usual // 5,
        activation_bytes=16384,
        input_row_bytes=chance.choice((0, 4096)),
    )
    plenty = chance.choice((0.4, 0.6, 0.8, 1.0, 1.3))
    nodes = []
    disk = chance.choice(("", "", "one for all"))
    for index in range(n_nodes):
        room = int(plenty * sum(layers) / n_nodes * chance.uniform(0.4, 1.7)) + 150 * MB
        devices = [DeviceFacts("cpu", room, decode_bytes_s=chance.uniform(4e9, 4e10))]
        if has_gpu[index]:
            devices.insert(
                0,
                DeviceFacts(
                    "gpu",
                    int(sum(layers) * chance.uniform(0.1, 0.6)),
                    shares_host=False,
                    decode_bytes_s=chance.uniform(5e10, 5e11),
                ),
            )
        nodes.append(NodeFacts("abcd"[index], room, tuple(devices), chance.uniform(3e8, 4e9), disk))
    nodes[0] = NodeFacts(
        "a",
        nodes[0].memory_bytes + model.output_bytes + model.input_bytes,
        tuple(
            DeviceFacts(
                d.id,
                d.memory_bytes + (model.output_bytes + model.input_bytes),
                d.shares_host,
                decode_bytes_s=d.decode_bytes_s,
            )
            for d in nodes[0].devices
        ),
        nodes[0].disk_bytes_s,
        disk,
    )
    alike = chance.random() < 0.5
    links = tuple(
        LinkFacts(a.name, b.name, chance.choice((0.0005, 0.003, 0.01)), 5e7) for a in nodes for b in nodes if a is not b
    )
    return Problem(
        model,
        tuple(nodes),
        "a",
        256,
        links[:0] + (LinkFacts(latency_s=chance.choice((0.0003, 0.003, 0.01))),) if alike else links,
    )


def exhaustive(problem: Problem) -> float:
    """Seconds per token of the best of all plans."""
    cluster = Cluster.of(problem)
    judge = Judge(cluster)
    near: list[Trial] = []
    best = float("inf")
    for way in itertools.product(range(len(cluster.places)), repeat=cluster.n_layers):
        trial = judge.trial(way, Trial(way, best * NEAR, float("inf"), {}) if near else None)
        if trial is not None:
            near.append(trial)
            best = min(best, trial.time_s)
    if not near:
        raise PlanError("there is no plan")
    budget = Budget(judge, 1 << 60)
    refined = [
        with_better_buffers(judge, trial, budget)
        for trial in sorted(near, key=lambda t: t.time_s)[:200]
        if trial.time_s < NEAR * best
    ]
    return token_s(_fastest(cluster, sorted(refined, key=lambda t: t.time_s)), problem)


def token_s(plan: Plan, problem: Problem) -> float:
    return predict(complete(plan, problem), problem).token_s


def small(first: int, n: int) -> None:
    ratios = []
    for seed in range(first, first + n):
        problem = small_problem(seed)
        began = time.process_time()
        try:
            best = exhaustive(problem)
        except PlanError:
            best = float("inf")
        middle = time.process_time()
        try:
            plan = solver.solve(problem)
            own = token_s(plan, problem)
        except PlanError:
            own = float("inf")
        ended = time.process_time()
        ratio = own / best if best < float("inf") else (1.0 if own == best else 0.0)
        ratios.append(ratio)
        mark = "" if ratio <= 1.02 else "  <<<"
        print(
            f"{seed:4} {len(problem.nodes)}x{problem.model.n_layers} {1e3 * best:9.1f} ms {1e3 * own:9.1f} ms {ratio:.4f} {middle - began:6.2f} s {ended - middle:5.2f} s{mark}",
            flush=True,
        )
    print(f"worst {max(ratios):.4f}, over 2 %: {sum(r > 1.02 for r in ratios)} of {n}")


if __name__ == "__main__":
    small(int(sys.argv[1]), int(sys.argv[2]))
