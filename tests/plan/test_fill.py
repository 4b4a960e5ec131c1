"""Which layers a node can take, and on which of its devices they lie."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement, pairwise

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.plan.check import complete
from prima_core.plan.fill import earliest_start, latest_stop, split_visits
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.plan.problem import DeviceFacts, ModelFacts, NodeFacts, Problem


def gpu(memory_bytes: int, number: int = 0) -> DeviceFacts:
    return DeviceFacts(f"gpu:{number}", memory_bytes, shares_host=False)


def cpu(memory_bytes: int = 10**6, id: str = "cpu", **growth: float) -> DeviceFacts:
    return DeviceFacts(id, memory_bytes, growth=growth)


def problem_of(layers: tuple[int, ...], *devices: DeviceFacts, host: int = 0, fixed: int = 0, kv: int = 0) -> Problem:
    """A node, the head, with these devices. All layers are of type Q; `kv`: bytes for each layer."""
    model = ModelFacts("m", layers, fixed, 0, kv, 9, layer_types={"Q": layers}, input_types={"Q": fixed})
    return Problem(model, (NodeFacts("a", host, devices),), "a", kv_tokens=1)


def shape(problem: Problem, *visits: tuple[int, int]) -> str:
    """The last letter of the device of every layer, visit by visit; one visit where none is given."""
    whole = visits or ((0, problem.model.n_layers),)
    made = split_visits(problem, [Visit("a", *visit) for visit in whole])
    return " ".join("".join(part.device[-1] * len(part.layers) for part in visit.split) for visit in made)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (problem_of((10,) * 6, gpu(100), cpu(), host=100), "000000"),
        (problem_of((10,) * 6, gpu(40), cpu(), host=100), "0000uu"),
        (problem_of((10,) * 6, gpu(40), cpu(), host=100, fixed=15), "00uuuu"),
        (problem_of((10,) * 6, gpu(40), cpu(), host=100, kv=10), "00uuuu"),
        (problem_of((10,) * 6, gpu(9), cpu(), host=100), "uuuuuu"),
        (problem_of((10,) * 6, gpu(20), gpu(30, 1), cpu(), host=10), "00111u"),
        (problem_of((10,) * 6, cpu(), gpu(30), host=40), "uuuu00"),
        (problem_of((10, 90, 10, 10), gpu(30), cpu(), host=200), "0uuu"),
    ],
)
def test_the_first_device_takes_what_it_can_then_the_next(problem: Problem, expected: str) -> None:
    assert shape(problem) == expected


def test_devices_that_share_the_hosts_memory_take_from_each_other() -> None:
    assert shape(problem_of((10,) * 6, cpu(1000, "x"), cpu(1000, "y"), host=60)) == "xxxxxx"
    assert shape(problem_of((10,) * 6, cpu(40, "x"), cpu(1000, "y"), host=60)) == "xxxxyy"
    with pytest.raises(PlanError):
        shape(problem_of((10,) * 6, cpu(40, "x"), cpu(1000, "y"), host=59))


def test_where_layers_grow_on_the_first_device_it_takes_fewer_so_that_all_fit() -> None:
    """On x a layer takes 20 bytes, on y 10, of the same 80."""
    assert shape(problem_of((10,) * 6, cpu(1000, "x", Q=2.0), cpu(1000, "y"), host=120)) == "xxxxxx"
    assert shape(problem_of((10,) * 6, cpu(1000, "x", Q=2.0), cpu(1000, "y"), host=80)) == "xxyyyy"
    assert shape(problem_of((10,) * 6, cpu(1000, "x", Q=2.0), cpu(1000, "y"), host=60)) == "yyyyyy"


def test_the_devices_of_all_visits_of_a_node_are_filled_together() -> None:
    problem = problem_of((10,) * 9, gpu(40), cpu(), host=100)
    assert shape(problem, (0, 3), (3, 6), (6, 9)) == "000 0uu uuu"


def test_a_node_with_one_device_needs_no_split() -> None:
    visit = Visit("a", 0, 2)
    assert split_visits(problem_of((10, 10), cpu(), host=20), [visit]) == (visit,)
    assert split_visits(problem_of((10, 10), host=20), [visit]) == (visit,)


def test_layers_that_do_not_fit_are_an_error_that_says_what_the_node_has() -> None:
    problem = problem_of((10**9,) * 6, gpu(2 * 10**9), cpu(9 * 10**9), host=3 * 10**9)
    with pytest.raises(
        PlanError, match=r"6 layers do not fit node 'a', which has: gpu:0 2\.00 GB, .*together 5\.00 GB"
    ):
        split_visits(problem, [Visit("a", 0, 6)])


@pytest.mark.parametrize(("host", "fixed"), [(20, 21), (19, 20)])
def test_a_head_without_room_for_the_ends_of_the_model_can_take_no_run(host: int, fixed: int) -> None:
    problem = problem_of((10,) * 3, gpu(host), cpu(), host=host, fixed=fixed)
    assert latest_stop(problem, "a", 0) is None
    assert earliest_start(problem, "a", 3) is None


def test_the_ends_lie_on_the_first_device_that_has_room_for_them() -> None:
    big = problem_of((10,) * 4, gpu(30), cpu(), host=70, fixed=31)
    assert big.end_device.id == "cpu"
    assert shape(big) == "000u"
    assert problem_of((10,), gpu(30), cpu(), host=30, fixed=30).end_device.id == "gpu:0"
    nowhere = problem_of((10,), gpu(30), cpu(), host=30, fixed=40)
    assert nowhere.end_device.id == "cpu", "from where they can be streamed"
    assert msgspec.structs.replace(nowhere, streaming=False).end_device.id == "gpu:0"


def can_hold(problem: Problem, start: int, stop: int) -> bool:
    """By trying every way to cut the layers into runs, in the order of the devices."""
    node = problem.node("a")
    for cuts in combinations_with_replacement(range(start, stop + 1), len(node.devices) - 1):
        runs = pairwise((start, *cuts, stop))
        split = tuple(Split(d.id, a, b) for d, (a, b) in zip(node.devices, runs, strict=True) if a < b)
        visits = (Visit("a", start, stop, split),) if split else ()
        others = tuple(Visit("b", a, b) for a, b in ((0, start), (stop, problem.model.n_layers)) if a < b)
        plan = Plan(problem.model.n_layers, "a", tuple(sorted((*visits, *others), key=lambda visit: visit.start)))
        try:
            complete(plan, Problem(problem.model, (node, NodeFacts("b", 10**9)), "a", 1))
        except PlanError:
            continue
        return True
    return False


def test_runs_are_as_long_as_they_can_be() -> None:
    """Of random devices, against trying everything out."""
    chance = random.Random(3)
    n_none = 0
    for _ in range(150):
        layers = tuple(chance.randint(1, 30) for _ in range(chance.randint(1, 6)))
        total = sum(layers)
        devices = tuple(
            DeviceFacts(str(n), chance.randint(0, total), chance.random() < 0.6, {"Q": chance.choice((1.0, 1.5, 2.0))})
            for n in range(chance.randint(1, 3))
        )
        fixed, kv = chance.choice((0, 3)), chance.choice((0, 4))
        problem = problem_of(layers, *devices, host=chance.randint(0, total), fixed=fixed, kv=kv)
        n = len(layers)
        stops = [stop for stop in range(n + 1) if can_hold(problem, 0, stop)]
        starts = [start for start in range(n + 1) if can_hold(problem, start, n)]
        assert latest_stop(problem, "a", 0) == max(stops, default=None)
        assert earliest_start(problem, "a", n) == min(starts, default=None)
        n_none += not stops
        if n in stops:
            [visit] = split_visits(problem, [Visit("a", 0, n)])
            complete(Plan(n, "a", (visit,)), problem)
    assert 5 < n_none < 100
