"""Random problems for solvers: the same for the same numbers, on every machine."""

from __future__ import annotations

import random

import msgspec

from prima_core.interfaces import Goal
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem

MB = 1_000_000
_KINDS = ("plain", "cpu", "gpu and cpu", "two gpus", "two gpus and cpu", "unified")


def random_problem(seed: int, index: int) -> Problem:
    """The `index`th problem of a series: every fourth is small enough to try everything out.

    From 1 to 16 nodes with one to three devices, from 1 to 90 layers of odd sizes. Memory is ample in every tenth, else
    about what is needed: often nothing fits, and about every second problem does not want weights to be streamed. Some
    heads have large ends of the model to hold, some nodes have nothing, some clusters are measured.
    """
    chance = random.Random(f"{seed} {index}")
    is_small = index % 4 == 0
    n_nodes = chance.randint(1, 3) if is_small else chance.randint(1, 16)
    model = _model(chance, chance.randint(1, 5) if is_small else chance.randint(1, 90))
    names = [f"n{number}" for number in range(n_nodes)]
    problem = Problem(model, (), chance.choice(names), kv_tokens=chance.choice((1, 64, 4096)))
    fixed = model.input_bytes + model.output_bytes
    needed = problem.layers_bytes(0, model.n_layers)
    if is_ample(index):
        rooms = [2 * (needed + fixed)] * n_nodes
    else:
        plenty = chance.choice((0.9, 1.1, 1.3, 2.0, 3.0))
        shares = [chance.choice((0.0, 1.0, 1.0, 2.0, 5.0)) * chance.random() for _ in names]
        rooms = [int(plenty * needed * share / (sum(shares) or 1.0)) for share in shares]
        rooms[names.index(problem.head)] += int(fixed * chance.choice((0.5, 1.0, 1.0, 1.2)))
    types = tuple(model.layer_types)
    nodes = tuple(_node(chance, name, room, types, is_ample(index)) for name, room in zip(names, rooms, strict=True))
    return _measured(random.Random(f"{seed} {index} rates"), Problem(model, nodes, problem.head, problem.kv_tokens))


def is_ample(index: int) -> bool:
    """Whether the first device of every node could hold all of the problem's model alone."""
    return index % 10 == 3


def _measured(chance: random.Random, problem: Problem) -> Problem:
    """With streaming wanted or not, some rounds asked for, and rates known or not; then also with a goal."""
    streaming, rounds = chance.random() < 0.5, chance.choice((0, 0, 0, 1, 3))
    if chance.random() < 0.5:
        return msgspec.structs.replace(problem, streaming=streaming, rounds=rounds)
    disk = chance.choice(("", "one for all"))
    nodes = tuple(
        msgspec.structs.replace(
            node,
            devices=tuple(
                msgspec.structs.replace(device, decode_bytes_s=chance.uniform(5e9, 5e11), prefill_bytes_s=1e12)
                for device in node.places
            ),
            disk_bytes_s=chance.uniform(2e8, 5e9),
            disk=disk,
        )
        for node in problem.nodes
    )
    links = (LinkFacts(latency_s=chance.choice((0.0, 0.001, 0.01)), bytes_s=1e8),)
    goal = chance.choice((Goal.LATENCY, Goal.LATENCY, Goal.THROUGHPUT, Goal.TTFT))
    return msgspec.structs.replace(
        problem,
        nodes=nodes,
        links=links,
        streaming=streaming,
        rounds=rounds,
        goal=goal,
        width=chance.choice((2, 8)) if goal is Goal.THROUGHPUT else 1,
        n_past=chance.choice((0, 1000)),
    )


def _model(chance: random.Random, n_layers: int) -> ModelFacts:
    usual = chance.randint(1, 400) * MB + chance.randint(0, 999)
    layers = tuple(usual if chance.random() < 0.7 else chance.randint(usual // 2, 2 * usual) for _ in range(n_layers))
    some = tuple(size // 3 for size in layers)
    ends = chance.choice((0, usual, 20 * usual)) + chance.randint(0, 999)
    return ModelFacts(
        name="random",
        layer_bytes=layers,
        input_bytes=ends // 2,
        output_bytes=ends - ends // 2,
        kv_bytes_per_token_layer=chance.choice((0, 512, 4096)),
        context_length=4096,
        layer_types={"Q6_K": some, "Q4_K": tuple(a - b for a, b in zip(layers, some, strict=True))},
        input_types={"Q6_K": ends // 2},
        output_types={"Q6_K": ends - ends // 2},
        largest_tensor_bytes=usual // 4,
        activation_bytes=16384,
    )


def _node(chance: random.Random, name: str, room: int, types: tuple[str, ...], ample: bool) -> NodeFacts:
    kind, part = chance.choice(_KINDS), chance.random()
    first, rest = (room, room) if ample else (int(room * part), room - int(room * part))
    gpu = DeviceFacts("gpu:0", first, shares_host=False)
    second = DeviceFacts("gpu:1", rest, shares_host=False)
    cpu = DeviceFacts("cpu", room * 2)
    if kind == "gpu and cpu":
        return NodeFacts(name, rest, (gpu, cpu))
    if kind == "two gpus":
        return NodeFacts(name, MB, (gpu, second))
    if kind == "two gpus and cpu":
        return NodeFacts(name, room // 2, (gpu, second, cpu))
    if kind == "unified":
        grown = DeviceFacts("gpu", room, growth={chance.choice(types): chance.choice((1.0, 1.125, 2.0))})
        return NodeFacts(name, room, (grown, cpu))
    return NodeFacts(name, room, (cpu,) if kind == "cpu" else ())
