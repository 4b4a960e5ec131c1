"""Problem files: what no cluster can be is refused by name, before a solver counts with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.plan.problem import (
    DeviceFacts,
    LinkFacts,
    ModelFacts,
    NodeFacts,
    Problem,
    problem_from_json,
    problem_to_json,
)

MODEL = ModelFacts(
    "tiny", (100, 100), 10, 10, 1, 64, layer_types={"Q4_K": (50, 50)}, input_types={"Q4_K": 10},
    largest_tensor_bytes=25, input_row_bytes=1, activation_bytes=64,
    expert_bytes=(60, 60), n_experts=8, n_experts_used=2, tensor_bytes=((25, 10), (25,)),
)  # fmt: skip
RATES = {"Q4_K": ((1, 1e9), (4, 9e8)), "output": ((1, 2e9),)}
GPU = DeviceFacts(
    "a:gpu", 500, shares_host=False, growth={"Q4_K": 1.5}, decode_bytes_s=1e9, prefill_bytes_s=1e11, rates=RATES
)
NODE = NodeFacts("head", 1000, (GPU,), disk_bytes_s=1e9, disk="sda")
LINKS = (LinkFacts("head", "b", 0.003, 1e8), LinkFacts(target="b", latency_s=0.004), LinkFacts(latency_s=0.005))
PROBLEM = Problem(MODEL, (NODE, NodeFacts("b", 10), NodeFacts("c", 10)), "head", 8, LINKS, rounds=2, streaming=False)
Tree = dict[str, Any]  # Any: JSON


def device(tree: Tree) -> Tree:
    found: Tree = tree["nodes"][0]["devices"][0]
    return found


@pytest.mark.parametrize(
    "change",
    [
        *(lambda tree, factor=factor: device(tree)["growth"].update(Q4_K=factor) for factor in (0, -5, 65, 1e308)),
        *(lambda tree, size=size: device(tree).update(memory_bytes=size) for size in (-1, 1 << 63, 10**400)),
        *(lambda tree, size=size: tree["nodes"][0].update(memory_bytes=size) for size in (-1, 10**400)),
        lambda tree: device(tree).update(id="\x1b[2J"),
        lambda tree: tree["nodes"][0].update(name="\x1b[2J"),
        lambda tree: tree["nodes"].append(tree["nodes"][0]),
        lambda tree: tree["nodes"][0]["devices"].append(device(tree)),
        lambda tree: tree["model"].update(layer_bytes=[100, -100]),
        lambda tree: tree["model"].update(input_bytes=-1),
        lambda tree: tree["model"].update(kv_bytes_per_token_layer=-1),
        lambda tree: tree["model"].update(context_length=-1),
        lambda tree: tree["model"].update(layer_types={"Q4_K": [-1, 50]}),
        lambda tree: tree.update(kv_tokens=-1),
        *(lambda tree, n=n: tree.update(rounds=n) for n in (-1, 1025)),
        *(lambda tree, rate=rate: tree["nodes"][0].update(disk_bytes_s=rate) for rate in (-1, 1e19, "1")),
        lambda tree: tree["nodes"][0].update(disk="\x1b[2J"),
        lambda tree: device(tree).update(decode_bytes_s=-1),
        lambda tree: device(tree).update(prefill_bytes_s=1e19),
        *(
            lambda tree, widths=widths: device(tree).update(rates={"Q4_K": widths})
            for widths in (
                [[4, 1e9], [1, 1e9]],
                [[1, 1e9], [1, 1e9]],
                [[0, 1e9]],
                [[1, 0]],
                [[1, 1e19]],
                [[1]],
                [1, 1e9],
            )
        ),
        lambda tree: tree["links"][0].update(latency_s=-1e-9),
        lambda tree: tree["links"][0].update(latency_s=1e7),
        lambda tree: tree["links"][0].update(bytes_s=-1),
        lambda tree: tree["links"][0].update(target="nobody"),
        lambda tree: tree["model"].update(expert_bytes=[60]),
        lambda tree: tree["model"].update(expert_bytes=[60, 101]),
        lambda tree: tree["model"].update(tensor_bytes=[[1]]),
        lambda tree: tree["model"].update(tensor_bytes=[[1], [100, 1]]),
        lambda tree: tree["model"].update(tensor_bytes=[[1], [1] * 17]),
        lambda tree: tree["model"].update(tensor_bytes=[[1], [-1]]),
        lambda tree: tree["model"].update(n_experts_used=9),
        lambda tree: tree["model"].update(n_experts_used=0),
        lambda tree: tree["model"].update(largest_tensor_bytes=-1),
        lambda tree: tree["model"].update(input_row_bytes=-1),
        lambda tree: tree["model"].update(activation_bytes=-1),
    ],
)
def test_a_problem_of_nonsense_is_refused(change: Callable[[Tree], None]) -> None:
    tree = json.loads(problem_to_json(PROBLEM))
    assert problem_from_json(json.dumps(tree).encode()) == PROBLEM
    change(tree)
    with pytest.raises(PlanError, match="not a problem file"):
        problem_from_json(json.dumps(tree).encode())


@pytest.mark.parametrize("number", [b"1.5", b"0.003", b"100000000.0"])
def test_what_is_no_number_is_refused(number: bytes) -> None:
    text = problem_to_json(PROBLEM)
    assert text.count(number + b"\n") + text.count(number + b",") == 1
    for wrong in (b"1e999", b"NaN", b"Infinity", b"null"):
        with pytest.raises(PlanError, match="not a problem file"):
            problem_from_json(text.replace(number, wrong))


def test_the_first_link_that_fits_counts_and_a_node_reaches_itself_at_once() -> None:
    assert PROBLEM.link("head", "b") == LINKS[0]
    assert PROBLEM.link("c", "b") == LINKS[1]
    assert PROBLEM.link("b", "head") == LINKS[2]
    assert PROBLEM.link("b", "b") == LinkFacts()
    assert msgspec.structs.replace(PROBLEM, links=()).link("b", "c").time_s(1e9) == 0
    assert LINKS[0].time_s(5e7) == pytest.approx(0.503)


def test_a_problem_file_from_before_there_were_rates_is_still_one() -> None:
    old = (
        b'{"model": {"name": "m", "layer_bytes": [1], "input_bytes": 0, "output_bytes": 0,'
        b' "kv_bytes_per_token_layer": 0, "context_length": 9},'
        b' "nodes": [{"name": "a", "memory_bytes": 10}], "head": "a", "kv_tokens": 1}'
    )
    problem = problem_from_json(old)
    assert (problem.rounds, problem.streaming, problem.links) == (0, True, ())
    assert problem.node("a").disk_bytes_s == 0


def test_a_link_without_bandwidth_is_refused_and_one_whose_bandwidth_does_not_matter_is_not() -> None:
    links = LinkFacts("head", "b", latency_s=0.001), LinkFacts("b", "head", bytes_s=1e9)
    free = msgspec.structs.replace(PROBLEM, links=links)
    assert problem_from_json(problem_to_json(free)) == free
    tree = json.loads(problem_to_json(free))
    tree["links"][0]["bytes_s"] = 0
    with pytest.raises(PlanError, match="link from head to b has a bandwidth of 0"):
        problem_from_json(json.dumps(tree).encode())
