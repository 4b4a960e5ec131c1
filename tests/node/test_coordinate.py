"""From members to a plan: as much KV room as there is memory for, and never a plan that breaks a rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from prima_core.arch.families import open_model
from prima_core.engine.scheduler import Room
from prima_core.errors import ModelError, PlanError
from prima_core.interfaces import KvType
from prima_core.memory.residency import SMALLEST_BYTES
from prima_core.model.weights import Model
from prima_core.node.coordinate import MAX_SEQUENCES, UNKNOWN_LINK, Planning, links_of, model_facts, room_of
from prima_core.node.member import Member
from prima_core.plan.plan import Certificate, Plan, Residency, Visit
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, Problem
from prima_core.testing.tinymodel import TinyModel, write_tiny_model

FACTS = ModelFacts("four layers", (100,) * 4, 40, 10, kv_bytes_per_token_layer=1, context_length=50)
PLAN = Plan(4, "head", (Visit("head", 0, 2), Visit("b", 2, 4)))
CPU = (DeviceFacts("numpy:cpu", 10_000),)
HEAD = Member("head", 10_000, CPU, "inproc://head")
B = Member("b", 10_000, CPU, "inproc://b")


def planning(parallel: int = 1, fixed: Plan | None = None, asked: list[Problem] | None = None) -> Planning:
    def solve(problem: Problem) -> Plan:
        if asked is not None:
            asked.append(problem)
        return PLAN

    return Planning(FACTS, "head", parallel, solve, fixed)


AB, BA = LinkFacts("head", "b", 0.001, 1e8), LinkFacts("b", "head", 0.002, 9e7)


def test_measured_links_are_the_problems() -> None:
    asked: list[Problem] = []
    planning(asked=asked)((HEAD, replace(B, links=(AB, BA))))
    assert asked[0].links == (AB, BA)


def test_a_link_that_was_not_measured_is_taken_to_be_as_slow_as_any() -> None:
    c = Member("c", 10_000, CPU, "inproc://c", links=(LinkFacts("head", "c", 0.005, 2e8),))
    assert links_of((HEAD, replace(B, links=(AB, BA)), c))[-1] == LinkFacts(latency_s=0.005, bytes_s=9e7)
    assert links_of((HEAD, B)) == (UNKNOWN_LINK,)
    assert links_of((HEAD,)) == ()


def test_links_of_nodes_that_have_gone_are_forgotten() -> None:
    assert links_of((replace(B, links=(AB, BA)),)) == ()


def test_of_a_node_that_joined_again_the_newest_links_count() -> None:
    again = replace(HEAD, links=(LinkFacts("head", "b", 0.009),))
    assert links_of((replace(B, links=(AB, BA)), again))[0].latency_s == 0.009


def test_a_plan_is_completed_with_kv_room_for_so_many_contexts() -> None:
    assert planning(parallel=4)((HEAD, B)).kv_tokens == 200


def test_the_head_comes_first_and_the_others_as_they_joined() -> None:
    asked: list[Problem] = []
    others = tuple(Member(name, 10_000, (), "") for name in ("z", "b", "a"))
    planning(asked=asked)((*others, HEAD))
    assert [node.name for node in asked[0].nodes] == ["head", "z", "b", "a"]


@pytest.mark.parametrize(("memory_bytes", "contexts"), [(650, 4), (649, 2), (450, 2), (449, 1), (350, 1)])
def test_where_memory_is_short_fewer_contexts_are_held(memory_bytes: int, contexts: int) -> None:
    """The head has 2 layers of 100 bytes, 50 of input and output, and 2 bytes of KV a position."""
    head = Member("head", memory_bytes, (), "")
    assert planning(parallel=4)((head, B)).kv_tokens == 50 * contexts


def test_memory_for_less_than_one_context_is_an_error_that_names_the_node() -> None:
    with pytest.raises(PlanError, match="node 'head' would need"):
        planning(parallel=4)((Member("head", 349, (), ""), B))


def test_a_plan_carries_a_forecast_where_the_nodes_rates_are_known() -> None:
    rated = (msgspec.structs.replace(CPU[0], decode_bytes_s=1e3, prefill_bytes_s=1e5),)
    forecast = planning()((Member("head", 10_000, rated, ""), Member("b", 10_000, rated, ""))).forecast
    assert forecast is not None
    hops_s = 2 * UNKNOWN_LINK.latency_s  # and 400 bytes of layers, 50 of the output, 200 of 50 positions of KV
    assert forecast.token_s == pytest.approx(0.65 + hops_s)
    assert planning()((HEAD, B)).forecast is None
    stale = msgspec.structs.replace(PLAN, forecast=forecast)
    assert planning(fixed=stale)((HEAD, B)).forecast is None


def test_where_some_rates_are_known_others_are_guessed_and_told() -> None:
    rated = (msgspec.structs.replace(CPU[0], decode_bytes_s=1e3, prefill_bytes_s=1e5),)
    members = (Member("head", 10_000, rated, ""), B)
    all_known = planning()((members[0], Member("b", 10_000, rated, "")))

    def solve(problem: Problem) -> Plan:
        return msgspec.structs.replace(PLAN, certificate=Certificate(about="by hand"))

    made = Planning(FACTS, "head", 1, solve)
    plan = made(members)
    assert plan.forecast == all_known.forecast
    told = made.explained(plan, members).explanation
    assert told is not None
    assert told.guesses == (
        "how fast numpy:cpu on b computes was not measured:"
        " it is taken to be as numpy:cpu on head, the slowest of its kind",
    )
    assert plan.certificate == Certificate(about=f"by hand; {told.guesses[0]}")


def test_a_better_plan_is_one_that_is_foretold_a_tenth_quicker_by_what_is_known_now() -> None:
    def member(name: str, rate: float) -> Member:
        cpu = DeviceFacts("numpy:cpu", 1000 * MB, decode_bytes_s=rate, prefill_bytes_s=30 * rate)
        return Member(name, 1000 * MB, (cpu,), "")

    def solve(problem: Problem) -> Plan:
        quick = [node for node in problem.nodes if node.devices[0].decode_bytes_s >= 9.5e9]
        cut = 4 if len(quick) == 2 else 6
        return Plan(8, "head", (Visit("head", 0, cut), Visit("b", cut, 8)))

    made = Planning(msgspec.structs.replace(LARGE, context_length=100), "head", 1, solve)
    followed = made((member("head", 1e10), member("b", 1e10)))
    assert made.better(followed, (member("head", 1e10), member("b", 1e10))) is None
    assert made.better(followed, (member("head", 1e10), member("b", 9.4e9))) is None, "it is hardly better"
    better = made.better(followed, (member("head", 1e10), member("b", 4e9)))
    assert better is not None
    assert [visit.stop for visit in better.visits] == [6, 8]
    fixed = Planning(made.model, "head", 1, solve, fixed=followed)
    assert fixed.better(followed, (member("head", 1e10), member("b", 4e9))) is None, "the user's plan stays"


MB = 10**6
LARGE = ModelFacts("m", (100 * MB,) * 8, 0, 0, 1000, 20_000, largest_tensor_bytes=20 * MB)
"""A context takes 20 MB of KV in each layer."""


@pytest.mark.parametrize(
    ("memory_mb", "contexts", "streams"), [(1440, 4, False), (1439, 2, False), (960, 1, False), (959, 1, True)]
)
def test_weights_are_streamed_only_where_not_even_one_context_fits_beside_them(
    memory_mb: int, contexts: int, streams: bool
) -> None:
    asked: list[Problem] = []

    def solve(problem: Problem) -> Plan:
        asked.append(problem)
        return Plan(8, "head", (Visit("head", 0, 8),))

    plan = Planning(LARGE, "head", 4, solve, rounds=3)((Member("head", memory_mb * MB, (), ""),))
    assert plan.kv_tokens == 20_000 * contexts
    assert any(need.streamed_bytes for need in plan.residency) == streams
    assert [problem.streaming for problem in asked] == [False] * (len(asked) - streams) + [True] * streams
    assert {problem.rounds for problem in asked} == {3}


def test_a_plan_file_wins_over_the_solver() -> None:
    fixed = Plan(4, "head", (Visit("b", 0, 4),), kv_tokens=70)
    plan = planning(fixed=fixed)((HEAD, B))
    assert (plan.visits, plan.kv_tokens) == (fixed.visits, 70)


def test_a_plan_file_with_a_node_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(PlanError, match="'b' is not in the cluster"):
        planning(fixed=PLAN)((HEAD,))


def test_a_plan_of_a_solver_is_checked() -> None:
    with pytest.raises(PlanError):
        Planning(FACTS, "head", 1, lambda problem: Plan(4, "head", (Visit("head", 0, 3),)))((HEAD, B))


def test_the_engines_room_is_the_plans() -> None:
    assert room_of(planning(parallel=2)((HEAD, B)), 33, 1000, 1) == Room(100, 33, MAX_SEQUENCES)


@pytest.mark.parametrize(
    ("device", "nodes", "longest", "chunk"),
    [
        ("a:cpu", ("head", "b"), 1000, 64),
        ("a:cpu", ("head", "head"), 1000, 128),
        ("a:gpu:0", ("head", "b"), 1000, 512),
        ("a:gpu:0", ("head", "b"), 99, 99),
    ],
)
def test_chunks_are_longer_where_a_gpu_computes_or_one_node(
    device: str, nodes: tuple[str, str], longest: int, chunk: int
) -> None:
    visits = tuple(Visit(node, i, i + 1) for i, node in enumerate(nodes))
    plan = Plan(2, "head", visits, residency=(Residency("head", device, 2, 2),), kv_tokens=5)
    assert room_of(plan, None, longest, 1).chunk_tokens == chunk


@pytest.mark.parametrize(("gather_bytes", "chunk"), [(0, 64), (500, 64), (3000, 300), (9000, 512)])
def test_chunks_are_as_long_as_a_gather_where_weights_come_from_disk(gather_bytes: int, chunk: int) -> None:
    visits, sizes = (Visit("head", 0, 1), Visit("b", 1, 2)), (2, 2, 1, 1)
    plan = Plan(2, "head", visits, (Residency("b", "a:cpu", *sizes),), 5, gather_bytes=gather_bytes)
    assert room_of(plan, None, 1000, 10).chunk_tokens == chunk
    assert room_of(plan, 33, 1000, 10).chunk_tokens == 33


def test_the_sizes_of_a_model_are_those_of_its_file(llama: Model) -> None:
    facts = model_facts(llama, 128)
    parts = sum(facts.layer_bytes) + facts.input_bytes + facts.output_bytes
    assert parts == sum(tensor.n_bytes for tensor in llama.file.tensors.values())
    assert (facts.n_layers, facts.context_length) == (llama.spec.n_layers, 128)


def test_the_sizes_that_streaming_needs_are_those_of_the_file(llama: Model, tied: Model) -> None:
    facts = model_facts(llama, 128)
    layers = [tensor for name, tensor in llama.file.tensors.items() if name.startswith("blk.")]
    assert facts.largest_tensor_bytes == max(tensor.n_bytes for tensor in layers)
    assert facts.input_row_bytes * llama.spec.vocab_size == facts.input_bytes
    assert facts.activation_bytes == 4 * llama.spec.d_model
    large = [tensor.n_bytes for tensor in layers if tensor.n_bytes >= SMALLEST_BYTES and len(tensor.shape) > 1]
    assert sorted(size for sizes in facts.tensor_bytes for size in sizes) == sorted(large)
    assert (facts.expert_bytes, facts.n_experts) == ((), 0)
    assert model_facts(tied, 128).input_row_bytes == 0, "it is the output matrix too"


def test_stacks_of_experts_are_counted_apart(tmp_path: Path) -> None:
    wanted = TinyModel(arch="qwen3moe", n_experts=5, n_experts_used=2)
    with open_model(write_tiny_model(tmp_path / "moe.gguf", wanted)) as moe:
        facts = model_facts(moe, 128)
        tensors = moe.file.tensors
        stacks = {name: tensor.n_bytes for name, tensor in tensors.items() if name.endswith("_exps.weight")}
        experts = moe.spec.experts
        assert experts is not None
        assert sum(facts.expert_bytes) == sum(stacks.values())
        assert not {size for sizes in facts.tensor_bytes for size in sizes} & set(stacks.values())
        assert (facts.n_experts, facts.n_experts_used) == (experts.count, experts.n_used) == (5, 2)
        others = [t.n_bytes for name, t in tensors.items() if name.startswith("blk.") and name not in stacks]
        assert facts.largest_tensor_bytes == max(max(stacks.values()) // experts.count, *others)


@pytest.mark.parametrize(("kv_type", "value"), [(KvType.F16, 2), (KvType.Q8_0, 34 / 32), (KvType.F32, 4)])
def test_kv_bytes_are_those_of_its_type(llama: Model, kv_type: KvType, value: float) -> None:
    facts = model_facts(llama, 128, kv_type)
    assert facts.kv_bytes_per_token_layer == 2 * llama.spec.n_kv_heads * llama.spec.head_dim * value
    assert facts.kv_type == kv_type


def test_heads_that_do_not_fit_the_kv_type_are_an_error_before_anything_is_loaded(tied: Model) -> None:
    assert tied.spec.head_dim == 16
    with pytest.raises(ModelError, match=r"heads of 16 values.*--kv-type f16"):
        model_facts(tied, 128, KvType.Q8_0)


@pytest.mark.parametrize(
    ("context", "kv_type", "stated", "served"),
    [
        (None, None, {}, (4096, KvType.F16)),
        (None, None, {"context": 300, "kv_type": KvType.Q8_0}, (300, KvType.Q8_0)),
        (100, KvType.F32, {"context": 300, "kv_type": KvType.Q8_0}, (100, KvType.F32)),
        (500, None, {"context": 300}, (500, KvType.F16)),
        (500, None, {"kv_tokens": 200}, (200, KvType.F16)),
        (None, None, {"context": 9999}, (4096, KvType.F16)),
    ],
)
def test_the_user_is_asked_first_then_the_plan_file(
    llama: Model,
    context: int | None,
    kv_type: KvType | None,
    stated: dict[str, object],
    served: tuple[int, KvType],
) -> None:
    facts = model_facts(llama, context, kv_type, msgspec.structs.replace(PLAN, **stated))
    assert (facts.context_length, facts.kv_type) == served


def test_bytes_are_told_by_type_too(tied: Model, llama: Model) -> None:
    for model in (tied, llama):
        facts = model_facts(model, 128)
        assert [sum(sizes) for sizes in zip(*facts.layer_types.values(), strict=True)] == list(facts.layer_bytes)
        assert sum(facts.input_types.values()) == facts.input_bytes
        assert sum(facts.output_types.values()) == facts.output_bytes
    assert set(model_facts(llama, 128).layer_types) == {"F32", "Q8_0"}


def test_a_tied_matrix_is_counted_once(tied: Model) -> None:
    assert model_facts(tied, 128).output_bytes == tied.file.tensors["output_norm.weight"].n_bytes


def test_weights_are_read_where_that_is_foretold_much_better_than_a_slow_node() -> None:
    """Both nodes keep all; without `b`, a hundred times as slow, `a` reads a tenth of the model."""

    def solve(problem: Problem) -> Plan:
        asked.append(problem.streaming)
        visits = (Visit("head", 0, 8),) if problem.streaming else (Visit("head", 0, 6), Visit("b", 6, 8))
        return Plan(8, "head", visits)

    def member(name: str, rate: float) -> Member:
        cpu = DeviceFacts("numpy:cpu", 700 * MB, decode_bytes_s=rate, prefill_bytes_s=30 * rate)
        return Member(name, 700 * MB, (cpu,), "", 2e9)

    for rate, streams in ((1e8, True), (1e10, False)):
        asked: list[bool] = []
        facts = msgspec.structs.replace(LARGE, context_length=100)
        plan = Planning(facts, "head", 1, solve)((member("head", 1e10), member("b", rate)))
        assert asked == [False, True]
        assert any(need.streamed_bytes for need in plan.residency) == streams


def test_who_gets_nothing_to_do_is_named_in_the_plan() -> None:
    idle = Member("idle", 10_000, CPU, "")
    members = (HEAD, B, idle)
    plan = planning().explained(planning()(members), members)
    assert plan.explanation is not None
    assert [out.node for out in plan.explanation.left_out] == ["idle"]


def test_the_problem_that_a_plan_was_made_for_is_found_again() -> None:
    asked: list[Problem] = []
    made = planning(parallel=4, asked=asked)
    plan = made((HEAD, B))
    assert made.solved(plan, (HEAD, B)) == asked[-1]
