"""How good and how quick the solver `halda` is, in foretold time per token, or to the first one (--goal ttft).

    python -m bench.solvers small [--goal latency] [--problems 300] [--first 0]
    python -m bench.solvers large [--goal throughput]

small: against the best of all plans, for random clusters of 2 to 4 nodes and models of up to 8 layers.
large: 16 nodes with 80 layers and 32 with 128, beside the other solvers, and how long it takes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from prima_core.errors import PlanError
from prima_core.interfaces import Goal
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan
from prima_core.plan.predict import goal_s, predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_core.plan.proportional import proportional
from prima_halda import compute, ilp, solver
from prima_halda.improve import Budget, with_better_buffers
from prima_halda.judge import Judges, Trial

MB = 1_000_000
N_WAYS = 70_000
"""Small problems have at most so many ways to lay layers on devices."""
NEAR, MOST_NEAR = 1.15, 200
"""Ways that take so many times as long as the best one get a search for better buffers, the best of them."""


def time_s(plan: Plan, problem: Problem) -> float:
    """What the problem's goal is about: per token, or to the first one."""
    return goal_s(predict(complete(plan, problem), problem), problem.goal)


# ---------------------------------------------------------------- small


def with_goal(problem: Problem, goal: Goal, chance: random.Random) -> Problem:
    """Prefill 10 to 60 times as fast as decode; for throughput 2 to 12 sequences; a context of up to 4000 tokens."""
    nodes = tuple(
        msgspec.structs.replace(
            node,
            devices=tuple(
                msgspec.structs.replace(device, prefill_bytes_s=device.decode_bytes_s * chance.uniform(10, 60))
                for device in node.devices
            ),
        )
        for node in problem.nodes
    )
    model = msgspec.structs.replace(problem.model, row_bytes=chance.choice((50_000, 150_000)))
    n_prompt, width = chance.choice((32, 300, 2000)), chance.choice((2, 4, 12)) if goal is Goal.THROUGHPUT else 1
    return msgspec.structs.replace(
        problem, model=model, nodes=nodes, goal=goal, width=width, n_prompt=n_prompt, n_past=chance.randint(0, 4000)
    )


def small_problem(seed: int, goal: Goal = Goal.LATENCY) -> Problem:
    """Memory from too little to plenty, some GPUs, slow links, shared disks, layers of odd sizes; of most the output
    part may be on any node."""
    problem, chance = _small_problem(seed), random.Random(f"output {seed}")
    if chance.random() < 0.75:
        logits = chance.choice((130_000, 600_000))
        problem = msgspec.structs.replace(problem, model=msgspec.structs.replace(problem.model, logits_bytes=logits))
    return problem if goal is Goal.LATENCY else with_goal(problem, goal, random.Random(f"{goal} {seed}"))


def _small_problem(seed: int) -> Problem:
    chance = random.Random(f"small {seed}")
    has_gpu = [chance.random() < 0.25 for _ in range(chance.randint(2, 4))]
    n_places = len(has_gpu) + sum(has_gpu)
    most = max(n for n in range(2, 9) if n_places**n <= N_WAYS)
    model = _small_model(chance, chance.randint(2, most))
    total, plenty = sum(model.layer_bytes), chance.choice((0.4, 0.6, 0.8, 1.0, 1.3))
    disk = chance.choice(("", "", "one for all"))
    nodes = []
    for name, gpu in zip("abcd", has_gpu, strict=False):
        room = int(plenty * total / len(has_gpu) * chance.uniform(0.4, 1.7)) + 150 * MB
        room += model.input_bytes + model.output_bytes if name == "a" else 0
        devices = [DeviceFacts("cpu", room, decode_bytes_s=chance.uniform(4e9, 4e10))]
        if gpu:
            own, rate = int(total * chance.uniform(0.1, 0.6)), chance.uniform(5e10, 5e11)
            devices.insert(0, DeviceFacts("gpu", own, shares_host=False, decode_bytes_s=rate))
        nodes.append(NodeFacts(name, room, tuple(devices), chance.uniform(3e8, 4e9), disk))
    return Problem(model, tuple(nodes), "a", 256, _small_links(chance, [node.name for node in nodes]))


def _small_model(chance: random.Random, n_layers: int) -> ModelFacts:
    usual, spread = chance.randint(60, 600) * MB, chance.choice((0.0, 0.0, 0.0, 0.12, 0.3))
    layers = tuple(int(usual * chance.uniform(1 - spread, 1 + spread)) for _ in range(n_layers))
    ends = chance.choice((0, usual // 2, usual))
    return ModelFacts(
        "small",
        layers,
        input_bytes=ends // 2,
        output_bytes=ends,
        kv_bytes_per_token_layer=1000,
        context_length=4096,
        largest_tensor_bytes=usual // 5,
        activation_bytes=16384,
        input_row_bytes=chance.choice((0, 4096)),
    )


def _small_links(chance: random.Random, names: Sequence[str]) -> tuple[LinkFacts, ...]:
    if chance.random() < 0.5:
        return (LinkFacts(latency_s=chance.choice((0.0003, 0.003, 0.01)), bytes_s=5e7),)
    pairs = itertools.permutations(names, 2)
    return tuple(LinkFacts(a, b, chance.choice((0.0005, 0.003, 0.01)), 5e7) for a, b in pairs)


def exhaustive(problem: Problem) -> float | None:
    """Seconds per token of the best of all plans, wherever they have the output part; None: there is none."""
    judges = Judges.of(problem)
    near: list[Trial] = []
    for output in judges.outputs:
        for way in itertools.product(range(len(judges.base.cluster.places)), repeat=problem.model.n_layers):
            limit = replace(near[-1], time_s=NEAR * near[-1].time_s, about_s=float("inf")) if near else None
            found = judges[output].trial(way, limit)
            if found is not None:
                near.append(found)
                near.sort(key=lambda trial: -trial.time_s)
    budget = Budget.more(judges.work, 1 << 60)
    refined = [with_better_buffers(judges[trial.output], trial, budget) for trial in near[::-1][:MOST_NEAR]]
    refined.sort(key=lambda trial: trial.time_s)
    best = solver.fastest(judges, refined)
    return None if best is None else best.time_s


def compare_small(first: int, n_problems: int, goal: Goal) -> None:
    ratios = []
    for seed in range(first, first + n_problems):
        problem, began_s = small_problem(seed, goal), time.process_time()
        best_s = exhaustive(problem)
        middle_s = time.process_time()
        own_s = _time_of(problem)
        ended_s = time.process_time()
        ratio = _ratio(own_s, best_s)
        ratios.append(ratio)
        shape = f"{len(problem.nodes)} nodes {problem.model.n_layers} layers"
        took = f"all plans {middle_s - began_s:6.2f} s, halda {ended_s - middle_s:5.2f} s"
        print(f"{seed:4}  {shape}  {_ms(best_s)} {_ms(own_s)} ms  {ratio:.4f}  {took}", flush=True)
    beyond = sum(ratio > 1.02 for ratio in ratios)
    print(f"of {n_problems} problems {beyond} over 2 %; the worst is {max(ratios):.4f} times the best plan's time")


def _ratio(own_s: float | None, best_s: float | None) -> float:
    if own_s is None or best_s is None:
        return 1.0 if own_s == best_s else float("inf")
    return own_s / best_s


def _time_of(problem: Problem) -> float | None:
    try:
        return time_s(solver.solve(problem), problem)
    except PlanError:
        return None


def _ms(time_s: float | None) -> str:
    return f"{1e3 * time_s:9.1f}" if time_s is not None else "  no plan"


# ---------------------------------------------------------------- large


def large_problem(n_nodes: int, n_layers: int, plenty: float, seed: int = 3, goal: Goal = Goal.LATENCY) -> Problem:
    """`plenty`: memory of all nodes, in times of the model."""
    chance = random.Random(seed)
    usual = 500 * MB
    layers = tuple(usual if layer % 4 else usual * 9 // 8 for layer in range(n_layers))
    model = ModelFacts(
        "large", layers, 300 * MB, 400 * MB, 4096, 4096, largest_tensor_bytes=120 * MB, activation_bytes=32768
    )
    model = msgspec.structs.replace(model, input_row_bytes=8192, logits_bytes=512_000)
    nodes = []
    for index in range(n_nodes):
        room = int(plenty * n_layers * usual / n_nodes * chance.uniform(0.3, 1.7)) + (800 * MB if index == 0 else 0)
        devices = [DeviceFacts("cpu", room, decode_bytes_s=chance.uniform(5e9, 5e10))]
        if chance.random() < 0.3:
            own, rate = int(chance.uniform(4, 12) * 1e9), chance.uniform(1e11, 8e11)
            devices.insert(0, DeviceFacts("gpu", own, shares_host=False, decode_bytes_s=rate))
        nodes.append(NodeFacts(f"n{index}", room, tuple(devices), chance.uniform(4e8, 4e9)))
    pairs = itertools.permutations([node.name for node in nodes], 2)
    links = tuple(LinkFacts(a, b, chance.uniform(0.0005, 0.008), 5e7) for a, b in pairs)
    problem = Problem(model, tuple(nodes), "n0", 8192, links)
    return problem if goal is Goal.LATENCY else with_goal(problem, goal, random.Random(f"{goal} {seed}"))


def compare_large(goal: Goal) -> None:
    solvers = {"halda": solver.solve, "halda-ilp": ilp.solve, "even": proportional, "compute": compute.solve}
    for n_nodes, n_layers in ((4, 80), (8, 80), (16, 80), (32, 128)):
        for plenty in (0.6, 0.8, 1.2):
            problem = large_problem(n_nodes, n_layers, plenty, goal=goal)
            print(f"{n_nodes} nodes, {n_layers} layers, memory for {plenty:.0%} of the model")
            for name, solve in solvers.items():
                began_s = time.process_time()
                plan = solve(problem)
                took_s = time.process_time() - began_s
                bound = f", bound {1e3 * plan.certificate.bound_s:.1f}" if name == "halda" and plan.certificate else ""
                shape = f"{len(plan.nodes)} nodes, {len(plan.visits)} visits"
                print(
                    f"  {name:9}  {1e3 * time_s(plan, problem):9.1f} ms  {shape}{bound}  ({took_s:.2f} s)", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("small", "large"))
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--goal", type=Goal, choices=tuple(Goal), default=Goal.LATENCY)
    arguments = parser.parse_args()
    if arguments.what == "small":
        compare_small(arguments.first, arguments.problems, arguments.goal)
    else:
        compare_large(arguments.goal)


if __name__ == "__main__":
    main()
