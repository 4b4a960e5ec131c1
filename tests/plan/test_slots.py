"""Devices that copy weights: what a plan says that is streamed passes on them in no more memory than it counts."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.interfaces import Layers
from prima_core.memory.residency import PIECE_BYTES, Holding, Streamed, holding, resized
from prima_core.model.header import TensorInfo
from prima_core.model.names import OUTPUT, OUTPUT_NORM
from prima_core.model.quant import GGUFType
from prima_core.plan import stream
from prima_core.plan.check import complete
from prima_core.plan.cures import with_cures
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, ModelFacts, NodeFacts, Problem, TensorKind
from prima_core.plan.proportional import proportional
from prima_core.plugins import Registry

KB, MB = 1 << 10, 1 << 20
SMALL = 4096
TYPES = (GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.Q8_0)
Tensors = dict[str, TensorInfo]


def info(name: str, kind: tuple[GGUFType, tuple[int, ...]], n_bytes: int) -> TensorInfo:
    return TensorInfo(name, kind[0], kind[0].name, kind[1], 0, n_bytes)


def random_tensors(chance: random.Random, n_layers: int, *, alike: bool, experts: bool) -> Tensors:
    """Of layers that are alike, or of tensors of which every layer has others."""
    sizes = [chance.randint(64, 6000) * KB for _ in range(5)]
    kinds = [((chance.choice(TYPES), (number + 1, 256)), size) for number, size in enumerate(sizes)]
    usual = [chance.choice(kinds) for _ in range(7)]
    tensors: Tensors = {}
    for layer in range(n_layers):
        for number in range(7):
            kind, size = usual[number] if alike else chance.choice(kinds)
            name = f"blk.{layer}.t{number}.weight"
            tensors[name] = info(name, kind, size)
        if experts:
            for number in range(3):
                kind, size = usual[number] if alike else chance.choice(kinds)
                name = f"blk.{layer}.u{number}_exps.weight"
                tensors[name] = info(name, (kind[0], (4, *kind[1])), 4 * size)
        name = f"blk.{layer}.norm.weight"
        tensors[name] = info(name, (GGUFType.F32, (SMALL // 4,)), SMALL)
    tensors[OUTPUT_NORM] = info(OUTPUT_NORM, (GGUFType.F32, (SMALL // 4,)), SMALL)
    rows = chance.choice((64, 4096))
    tensors[OUTPUT] = info(OUTPUT, (chance.choice(TYPES), (rows, 256)), rows * chance.choice((2, 6)) * KB)
    return tensors


def facts_of(tensors: Tensors, n_layers: int) -> ModelFacts:
    held = holding(tensors, (Layers(0, n_layers),), ())
    dense = [sorted(held.layers[layer]) for layer in range(n_layers)]
    stacks = [sorted(held.experts.get(layer, ())) for layer in range(n_layers)]
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    layer_kinds = tuple(
        tuple(kinds.setdefault((tensors[name].type_name, tensors[name].shape), len(kinds)) for name in one + other)
        for one, other in zip(dense, stacks, strict=True)
    )
    sizes = {(tensor.type_name, tensor.shape): tensor.n_bytes for tensor in tensors.values()}
    layers = [[tensor for name, tensor in tensors.items() if name.startswith(f"blk.{n}.")] for n in range(n_layers)]
    return ModelFacts(
        "m",
        tuple(sum(tensor.n_bytes for tensor in layer) for layer in layers),
        0,
        tensors[OUTPUT].n_bytes + SMALL,
        100,
        4096,
        layer_types={
            type.name: tuple(sum(tensor.n_bytes for tensor in layer if tensor.type is type) for layer in layers)
            for type in TYPES
        },
        output_types={tensors[OUTPUT].type_name: tensors[OUTPUT].n_bytes},
        largest_tensor_bytes=max(
            tensor.n_bytes // tensor.shape[0] ** (len(tensor.shape) == 3) for layer in layers for tensor in layer
        ),
        input_row_bytes=1,
        expert_bytes=tuple(sum(held.experts.get(n, {}).values()) for n in range(n_layers)) if any(stacks) else (),
        n_experts=4 if any(stacks) else 0,
        n_experts_used=2 if any(stacks) else 0,
        tensor_bytes=tuple(tuple(tensors[name].n_bytes for name in names) for names in dense),
        kinds=tuple(TensorKind(kind[0], sizes[kind]) for kind in kinds),
        layer_kinds=layer_kinds,
    )


def on_device(tensor: TensorInfo, device: DeviceFacts) -> int:
    return math.ceil(tensor.n_bytes * device.growth.get(tensor.type_name, 1.0))


def taken(tensors: Tensors, held: Holding, streamed: Streamed, device: DeviceFacts) -> int:
    """What `arch.blocks` and `arch.ends` put on a device, by the store's choice; with experts that it keeps."""
    names = {name for of in streamed.layers.values() for name in of}
    if streamed.on_demand:
        names |= {name for of in held.experts.values() for name in of}
    total = held.expert_bytes - streamed.expert_bytes if streamed.on_demand and device.shares_host else 0
    slots, sizes = Counter[object](), dict[object, int]()
    for layer in held.layers:
        passing = Counter[object]()
        for name, tensor in tensors.items():
            if name.startswith(f"blk.{layer}."):
                kind = (tensor.type, tensor.shape)
                sizes[kind] = on_device(tensor, device)
                passing[kind] += name in names
                total += 0 if name in names else sizes[kind]
        slots |= passing
    total += sum(n * sizes[kind] for kind, n in slots.items()) + SMALL
    if not streamed.n_blocks:
        return total + on_device(tensors[OUTPUT], device)
    kept = sum(held.blocks[: len(held.blocks) - streamed.n_blocks])  # in the host's memory, as in the file
    blocks = sum(sorted({held.blocks[0], held.blocks[-1]}))
    return total + min(PIECE_BYTES, blocks) * on_device(tensors[OUTPUT], device) // tensors[OUTPUT].n_bytes + kept


def random_case(seed: int) -> tuple[Tensors, Problem]:
    chance = random.Random(seed)
    n_layers, experts = chance.randint(1, 9), chance.random() < 0.25
    tensors = random_tensors(chance, n_layers, alike=chance.random() < 0.5, experts=experts)
    facts = facts_of(tensors, n_layers)
    growth = {type.name: chance.choice((1.0, 1.125, 1.5)) for type in TYPES if chance.random() < 0.5}
    whole, room = sum(facts.layer_bytes) + facts.output_bytes, chance.uniform(0.1, 1.2)
    shares_host = chance.random() < 0.5
    device = DeviceFacts("d", int(whole * room), shares_host, growth, copies=True)
    host = int(whole * room) + 1000 if shares_host else 4096 * MB
    return tensors, Problem(facts, (NodeFacts("a", host, (device,)),), "a", 100)


def plan_of(problem: Problem) -> Plan:
    n_layers = problem.model.n_layers
    return complete(Plan(n_layers, "a", (Visit("a", 0, n_layers),)), problem)


def found(n_cases: int) -> Iterator[tuple[Tensors, Problem, Residency]]:
    for seed in range(n_cases):
        tensors, problem = random_case(seed)
        try:
            plan = plan_of(problem)
        except PlanError:
            continue
        if plan.residency[0].streamed_bytes:
            yield tensors, problem, plan.residency[0]


def test_no_device_takes_more_than_its_plan_says_and_few_take_much_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LEAST_BUFFER_BYTES", 1)
    n_cases, slack, kinds = 0, 0.0, Counter[bool]()
    for tensors, problem, need in found(250):
        device = problem.nodes[0].devices[0]
        held = holding(tensors, (Layers(0, problem.model.n_layers),), (OUTPUT_NORM, OUTPUT))
        real = taken(tensors, held, resized(held, Streamed(), need.streamed_bytes), device)
        said = need.pinned_bytes + need.slot_bytes
        assert real <= said, need
        assert said + need.kv_bytes + need.buffer_bytes * device.shares_host <= device.memory_bytes
        n_cases, slack = n_cases + 1, slack + (said - real) / said
        kinds[device.shares_host] += 1
    assert min(kinds.values()) > 30
    assert slack / n_cases < 0.02


# ---------------------------------------------------------------- a GPU alone

GB = 10**9
MODEL = ModelFacts(
    "40 GB", (5 * GB // 10,) * 80, GB // 2, GB // 2, 4000, 4096, largest_tensor_bytes=GB // 8, input_row_bytes=9000
)


def gpu_alone(memory_gb: float, host_gb: float, copy_bytes_s: float = 0.0, model: ModelFacts = MODEL) -> Problem:
    gpu = DeviceFacts(
        "gpu",
        int(memory_gb * GB),
        False,
        decode_bytes_s=1e12,
        prefill_bytes_s=1e14,
        copies=True,
        copy_bytes_s=copy_bytes_s,
    )
    return Problem(model, (NodeFacts("a", int(host_gb * GB), (gpu,), 2e9),), "a", 4096)


def test_a_gpu_alone_streams_what_its_memory_lacks_through_a_buffer_of_the_host_which_keeps_what_it_can() -> None:
    problem = gpu_alone(24, 8)
    plan = plan_of(problem)
    [need] = plan.residency
    assert (need.device, plan.end_device) == ("gpu", "gpu")
    assert 24 * GB - GB // 4 < need.pinned_bytes + need.slot_bytes + need.kv_bytes <= 24 * GB
    assert need.streamed_bytes > 41 * GB - 24 * GB
    assert need.buffer_bytes + need.host_bytes + plan.gather_bytes == 8 * GB
    assert need.buffer_bytes < GB, "a larger one would help nothing: nobody computes while it waits"
    assert complete(plan, problem) == plan
    node = predict(plan, problem).nodes[0]
    assert node.read_bytes == pytest.approx(need.disk_bytes - GB // 2), "the embedding is looked up"
    assert node.pinned_bytes == need.pinned_bytes + need.host_bytes


def test_what_the_host_of_a_gpu_has_room_for_is_copied_for_every_token_and_not_read() -> None:
    times = {}
    for host_gb in (1, 64):
        problem = gpu_alone(24, host_gb, copy_bytes_s=2e10)
        plan = plan_of(problem)
        times[host_gb] = predict(plan, problem).token_s
    [need] = plan.residency
    assert need.host_bytes == need.streamed_bytes
    assert predict(plan, problem).nodes[0].read_bytes == 0
    assert times[1] > 8.0
    assert times[64] == pytest.approx((need.streamed_bytes - GB // 2) / 2e10 + 41 * GB / 1e12, rel=0.02)
    assert times[64] < 1.0


def test_what_is_not_read_needs_no_rate_of_the_disk() -> None:
    problem = gpu_alone(24, 64, copy_bytes_s=2e10)
    [node] = problem.nodes
    unknown = msgspec.structs.replace(problem, nodes=(msgspec.structs.replace(node, disk_bytes_s=0.0),))
    assert predict(plan_of(unknown), unknown).token_s == predict(plan_of(problem), problem).token_s


def test_nobody_states_what_the_host_keeps() -> None:
    """Whatever a plan says: it is what is left beside its buffer."""
    problem = gpu_alone(24, 8)
    plan = plan_of(problem)
    [need] = plan.residency
    for said in (0, 30 * GB, -5):
        other = msgspec.structs.replace(need, host_bytes=said)
        assert complete(msgspec.structs.replace(plan, residency=(other,)), problem) == plan
    smaller = msgspec.structs.replace(need, buffer_bytes=need.buffer_bytes + GB)
    [done] = complete(msgspec.structs.replace(plan, residency=(smaller,)), problem).residency
    assert done.host_bytes == need.host_bytes - GB


def test_what_is_copied_to_a_gpu_takes_time_besides_computing() -> None:
    free, slow = gpu_alone(24, 8), gpu_alone(24, 8, copy_bytes_s=1e9)
    forecasts = [predict(plan_of(problem), problem) for problem in (free, slow)]
    read = forecasts[0].nodes[0].read_bytes
    copied = plan_of(free).residency[0].streamed_bytes - GB // 2
    assert forecasts[1].nodes[0].compute_s - forecasts[0].nodes[0].compute_s == pytest.approx(copied / 1e9)
    assert forecasts[0].token_s == pytest.approx(read / 2e9, rel=0.02)
    assert forecasts[1].token_s == pytest.approx(copied / 1e9, rel=0.05)


def test_what_fits_a_gpu_is_not_streamed() -> None:
    [need] = plan_of(gpu_alone(43, 1)).residency
    assert (need.streamed_bytes, need.slot_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("memory_gb", "host_gb", "says"),
    [
        (24, 0.2, r"it would need 24\.00 GB on gpu and 0\.\d+ GB of the host's memory"),
        (1, 8, r"it would need \d\.\d+ GB on gpu and 8\.00 GB of the host's memory"),
    ],
)
def test_a_gpu_needs_room_for_slots_and_the_host_for_the_buffer(memory_gb: float, host_gb: float, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        plan_of(gpu_alone(memory_gb, host_gb))
    found = re.search(r"need (\S+) GB on gpu and (\S+) GB of", error.value.message)
    assert found is not None
    plan_of(gpu_alone(float(found[1]) + 0.01, float(found[2]) + 0.01))


def test_experts_of_a_gpu_are_all_read_and_all_streamed_or_none() -> None:
    """Which are chosen nobody asks there, and what the store would keep of them would be in the host's memory."""
    sparse = msgspec.structs.replace(MODEL, expert_bytes=(4 * GB // 10,) * 80, n_experts=8, n_experts_used=2)
    problem = gpu_alone(24, 8, model=sparse)
    plan = plan_of(problem)
    [need] = plan.residency
    assert need.streamed_bytes >= 32 * GB
    assert predict(plan, problem).nodes[0].read_bytes == pytest.approx(need.disk_bytes - GB // 2)
    assert predict(plan, problem, width=8).nodes[0].read_bytes == pytest.approx(need.disk_bytes - GB // 2)
    said = msgspec.structs.replace(need, streamed_bytes=30 * GB)
    with pytest.raises(PlanError, match="streamed as a whole") as error:
        complete(msgspec.structs.replace(plan, residency=(said,)), problem)
    assert f"{32 * GB + GB // 2} bytes" in error.value.hint


def test_of_two_gpus_the_last_streams() -> None:
    one = gpu_alone(24, 8)
    [node] = one.nodes
    [gpu] = node.devices
    devices = (gpu, msgspec.structs.replace(gpu, id="other", memory_bytes=8 * GB))
    problem = msgspec.structs.replace(one, nodes=(msgspec.structs.replace(node, devices=devices),))
    plan = complete(proportional(problem), problem)
    assert {need.device: need.streamed_bytes > 0 for need in plan.residency} == {"gpu": False, "other": True}


def test_several_visits_of_a_gpu_give_it_a_larger_buffer_which_takes_from_what_its_host_keeps() -> None:
    one = gpu_alone(24, 9)
    cpu = NodeFacts("b", 20 * GB, (DeviceFacts("cpu", 20 * GB, decode_bytes_s=5e9, prefill_bytes_s=1e12),), 2e9)
    problem = msgspec.structs.replace(one, nodes=(*one.nodes, cpu))
    cuts = [*range(0, 80, 8), 80]
    needs = []
    for names in (["a"] * 8 + ["b"] * 2, ["a", "a", "a", "a", "b"] * 2):
        visits = tuple(Visit(name, start, stop) for name, (start, stop) in zip(names, pairwise(cuts), strict=True))
        plan = complete(Plan(80, "a", visits), problem)
        needs.append(next(need for need in plan.residency if need.node == "a"))
        assert predict(plan, problem).token_s >= predict(plan, problem).bound_s * 0.999
    once, twice = needs
    assert twice.buffer_bytes > 1.5 * once.buffer_bytes
    assert once.streamed_bytes == twice.streamed_bytes
    assert once.buffer_bytes + once.host_bytes == twice.buffer_bytes + twice.host_bytes


@pytest.mark.parametrize("solver", ["even", "halda"])
def test_solvers_stream_on_gpus_that_are_alone(solver: str) -> None:
    one = gpu_alone(12, 8, copy_bytes_s=2e10)
    [node] = one.nodes
    problem = msgspec.structs.replace(one, nodes=(node, msgspec.structs.replace(node, name="b")))
    solve = Registry.load({"PRIMA_PLUGINS": solver}).solver(solver).solve
    plan = complete(solve(problem), problem)
    assert all(need.streamed_bytes and need.host_bytes for need in plan.residency)
    assert predict(plan, problem).token_s < 2.2, "19 GB are copied one after the other; of them 4 are read on two disks"


def test_a_host_too_small_for_the_buffer_of_its_gpu_is_told_how_much_more_would_do() -> None:
    problem = gpu_alone(24, 0.2)
    with pytest.raises(PlanError) as error:
        Registry.load({"PRIMA_PLUGINS": "halda"}).solver("halda").solve(problem)
    assert re.search(r"let a use [\d.]+ GB more of memory", with_cures(problem, error.value).hint)
