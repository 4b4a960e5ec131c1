"""Problem files: what no cluster can be is refused by name, before a solver counts with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from prima_core.errors import PlanError
from prima_core.plan.problem import DeviceFacts, ModelFacts, NodeFacts, Problem, problem_from_json, problem_to_json

MODEL = ModelFacts("tiny", (100, 100), 10, 10, 1, 64, layer_types={"Q4_K": (50, 50)}, input_types={"Q4_K": 10})
NODE = NodeFacts("head", 1000, (DeviceFacts("a:gpu", 500, shares_host=False, growth={"Q4_K": 1.5}),))
PROBLEM = Problem(MODEL, (NODE,), "head", 8)
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
    ],
)
def test_a_problem_of_nonsense_is_refused(change: Callable[[Tree], None]) -> None:
    tree = json.loads(problem_to_json(PROBLEM))
    assert problem_from_json(json.dumps(tree).encode()) == PROBLEM
    change(tree)
    with pytest.raises(PlanError, match="not a problem file"):
        problem_from_json(json.dumps(tree).encode())


def test_growth_that_is_no_number_is_refused() -> None:
    text = problem_to_json(PROBLEM)
    assert text.count(b"1.5") == 1
    for wrong in (b"1e999", b"NaN", b"Infinity", b"null"):
        with pytest.raises(PlanError, match="not a problem file"):
            problem_from_json(text.replace(b"1.5", wrong))
