from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan
from prima_core.plan.problem import ModelFacts, NodeFacts, Problem
from prima_even.solver import solve


def problem_of(layers: tuple[int, ...], *memory_bytes: int, fixed: int = 0, kv: int = 0) -> Problem:
    """Nodes a, b, c, ... of so much memory; `a` is the head. `kv`: bytes of KV for each layer."""
    model = ModelFacts("m", layers, input_bytes=fixed, output_bytes=0, kv_bytes_per_token_layer=kv, context_length=9)
    nodes = tuple(NodeFacts(chr(ord("a") + index), memory) for index, memory in enumerate(memory_bytes))
    return Problem(model=model, nodes=nodes, head="a", kv_tokens=1)


def shape(plan: Plan) -> str:
    """The node of every layer, e.g. `aab`."""
    return "".join(visit.node * len(visit.layers) for visit in plan.visits)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (problem_of((10,) * 8, 1000), "aaaaaaaa"),
        (problem_of((10,) * 8, 1000, 1000), "aaaabbbb"),
        (problem_of((10,) * 8, 1000, 1000, 2000), "aabbcccc"),
        (problem_of((10,) * 8, 3000, 1000), "aaaaaabb"),
        (problem_of((10,) * 7, 1000, 1000), "aaabbbb"),
        (problem_of((10, 10, 40, 10, 10), 1000, 1000), "aabbb"),
    ],
)
def test_layers_are_in_proportion_to_memory(problem: Problem, expected: str) -> None:
    assert shape(solve(problem)) == expected


def test_the_input_and_output_part_counts_against_the_head() -> None:
    assert shape(solve(problem_of((10,) * 8, 1600, 1000, fixed=600))) == "aaaabbbb"
    assert shape(solve(problem_of((10,) * 4, 600, 1000, fixed=600))) == "bbbb"


def test_kv_counts_for_every_layer() -> None:
    assert shape(solve(problem_of((10,) * 4, 100, 100, kv=40))) == "aabb"
    with pytest.raises(PlanError):
        solve(problem_of((10,) * 4, 100, 99, kv=40))


def test_the_head_comes_first_wherever_it_stands() -> None:
    problem = problem_of((10,) * 6, 100, 100, 100)
    last = Problem(problem.model, (problem.nodes[1], problem.nodes[2], problem.nodes[0]), "a", 1)
    assert shape(solve(last)) == "aabbcc"


def test_a_node_whose_share_is_far_below_a_layer_gets_none() -> None:
    assert shape(solve(problem_of((10,) * 4, 1000, 5, 1000))) == "aacc"


def test_more_nodes_than_layers_leave_some_without() -> None:
    plan = solve(problem_of((10,) * 2, 100, 100, 100, 100))
    assert len(plan.visits) == 2


def test_a_node_that_rounding_would_overfill_hands_on() -> None:
    # a's share is 15.5 of 50, and the nearest border, 20, is more than it has.
    assert shape(solve(problem_of((10,) * 5, 18, 40))) == "abbbb"


def test_an_error_says_what_is_needed_and_what_is_there() -> None:
    problem = problem_of((10**9,) * 4, 2 * 10**9, 10**9, fixed=5 * 10**8, kv=10**8)
    with pytest.raises(PlanError, match=r"need 4\.4 GB.* 0\.5 GB on a; .*: a 2 GB, b 1 GB") as error:
        solve(problem)
    assert "-c" in error.value.hint


def test_a_head_too_small_for_the_input_part_is_an_error_however_large_the_others() -> None:
    with pytest.raises(PlanError):
        solve(problem_of((10,) * 4, 50, 10_000, fixed=51))


def fits_somehow(problem: Problem) -> bool:
    """By trying every way to cut the layers into runs."""
    n_layers, n_nodes = problem.model.n_layers, len(problem.nodes)
    rooms = [node.memory_bytes - problem.fixed_bytes(node.name) for node in problem.nodes]
    for dividers in combinations(range(n_layers + n_nodes - 1), n_nodes - 1):
        cuts = [0, *(divider - index for index, divider in enumerate(dividers)), n_layers]
        sizes = [problem.layers_bytes(start, stop) for start, stop in pairwise(cuts)]
        if all(size <= room for size, room in zip(sizes, rooms, strict=True)):
            return True
    return False


def random_problem(chance: random.Random) -> Problem:
    layers = tuple(chance.randint(1, 20) for _ in range(chance.randint(1, 7)))
    each = 2 * sum(layers) // chance.randint(1, 4) + 1
    memory = [chance.randint(0, each) for _ in range(chance.randint(1, 4))]
    return problem_of(layers, *memory, fixed=chance.randint(0, 5), kv=chance.randint(0, 3))


def test_it_finds_a_right_plan_exactly_where_there_is_one() -> None:
    chance, found = random.Random(7), 0
    for _ in range(400):
        problem = random_problem(chance)
        if fits_somehow(problem):
            found += 1
            assert complete(solve(problem), problem).solver == "even"
        else:
            with pytest.raises(PlanError):
                solve(problem)
    assert 100 < found < 300, "the cases should be of both kinds"


def test_every_node_whose_share_is_a_layer_gets_layers_where_memory_is_plenty() -> None:
    chance = random.Random(11)
    for _ in range(200):
        layers = tuple(chance.randint(5, 10) for _ in range(chance.randint(4, 12)))
        memory = [chance.randint(200, 1000) for _ in range(chance.randint(1, 4))]
        plan = solve(problem_of(layers, *memory))
        shares = [sum(layers) * room / sum(memory) for room in memory]
        for name, share in zip("abcd", shares, strict=False):
            assert share < max(layers) or plan.layers_of(name), (layers, memory, name)


def test_it_answers_the_same_twice() -> None:
    problem = problem_of((3, 1, 4, 1, 5, 9, 2, 6), 40, 30, 20)
    assert solve(problem) == solve(problem)
