"""Plans larger than memory: what stays, what is streamed, through which buffer; and what a plan may say of it."""

from __future__ import annotations

import random

import msgspec
import pytest

from prima_core.errors import PlanError
from prima_core.memory.residency import BLOCK_BYTES
from prima_core.plan.check import complete
from prima_core.plan.plan import Plan, Residency, Split, Visit, plan_from_json, plan_to_json
from prima_core.plan.predict import predict
from prima_core.plan.problem import DeviceFacts, LinkFacts, ModelFacts, NodeFacts, Problem
from prima_core.plan.stream import ALIGNING_BYTES, GATHER_BYTES, LEAST_BUFFER_BYTES

MB = 10**6
MODEL = ModelFacts("m", (100 * MB,) * 32, 200 * MB, 300 * MB, 1000, 4096, largest_tensor_bytes=30 * MB)


def problem_of(*memory_mb: int, disk_bytes_s: float = 0.0, model: ModelFacts = MODEL, **more: object) -> Problem:
    """Nodes a, b, ... of so much memory, `a` the head, 1000 KV positions: 1 MB for each layer."""
    decode, prefill = (10e9, 300e9) if disk_bytes_s else (0.0, 0.0)
    nodes = tuple(
        NodeFacts(
            "abcd"[index],
            size * MB,
            (DeviceFacts("cpu", size * MB, decode_bytes_s=decode, prefill_bytes_s=prefill),),
            disk_bytes_s,
        )
        for index, size in enumerate(memory_mb)
    )
    return msgspec.structs.replace(Problem(model, nodes, "a", 1000), **more)


def rounds(n_rounds: int, names: str, n_layers: int = 32) -> Plan:
    each = n_layers // (n_rounds * len(names))
    visits = tuple(Visit(name, each * index, each * (index + 1)) for index, name in enumerate(names * n_rounds))
    return Plan(n_layers, "a", visits)


def need_of(plan: Plan, node: str) -> Residency:
    [need] = [need for need in plan.residency if need.node == node]
    return need


ALONE = rounds(1, "a")


def test_what_fits_to_the_byte_is_not_streamed_and_one_byte_less_is() -> None:
    whole = 3700 * MB + 32 * MB
    for lacking in (0, 1):
        problem = msgspec.structs.replace(problem_of(0), nodes=(NodeFacts("a", whole - lacking),))
        need = need_of(complete(ALONE, problem), "a")
        assert bool(need.streamed_bytes) == bool(lacking)
        assert need.pinned_bytes + need.buffer_bytes + need.kv_bytes <= whole - lacking


def test_a_node_streams_what_it_lacks_and_its_buffer_and_uses_its_memory_to_the_byte() -> None:
    plan = complete(ALONE, problem_of(2500))
    need = need_of(plan, "a")
    over = 3700 * MB - (2500 - 32) * MB + plan.gather_bytes
    assert plan.gather_bytes == GATHER_BYTES
    assert need.streamed_bytes == over + need.buffer_bytes
    assert need.pinned_bytes + need.buffer_bytes + need.kv_bytes + plan.gather_bytes == 2500 * MB
    share = -(-need.streamed_bytes // 32)
    assert need.buffer_bytes >= max(LEAST_BUFFER_BYTES, 2 * share + 30 * MB), "two layers' worth"
    assert need.buffer_bytes <= 2.1 * (share + 30 * MB), "and not much more, as it is visited once"
    assert complete(plan, problem_of(2500)) == plan
    assert plan_from_json(plan_to_json(plan)) == plan


KNOWN = msgspec.structs.replace(MODEL, tensor_bytes=((30 * MB, 30 * MB, 30 * MB, 10 * MB),) * 32)
BESIDE = Plan(32, "a", (Visit("a", 0, 31), Visit("b", 31, 32)))


def sharing_a_disk(*memory_mb: int, model: ModelFacts, disk: str = "d") -> Problem:
    problem = problem_of(*memory_mb, model=model)
    nodes = tuple(msgspec.structs.replace(node, disk=disk) for node in problem.nodes)
    return msgspec.structs.replace(problem, nodes=nodes)


def test_with_known_sizes_of_tensors_buffers_are_as_small_as_the_store_can_do_with() -> None:
    """Of each layer 40 MB is to be streamed: 30 and 10, and as much as the larger one is lost at the ring's end."""
    memory = 3631 - 31 * 40 + 70 + 37  # and what is gathered
    problem = sharing_a_disk(memory, 4000, model=KNOWN)
    need = need_of(complete(BESIDE, problem), "a")
    assert need.buffer_bytes == 70 * MB + 3 * ALIGNING_BYTES
    assert 31 * 39 * MB < need.streamed_bytes <= 31 * 40 * MB
    assert need.buffer_bytes < need_of(complete(BESIDE, sharing_a_disk(memory, 4000, model=MODEL)), "a").buffer_bytes
    said = msgspec.structs.replace(need, buffer_bytes=need.buffer_bytes - 1)
    with pytest.raises(PlanError, match=f"a buffer of {need.buffer_bytes} bytes at least"):
        complete(msgspec.structs.replace(BESIDE, residency=(said,)), problem)


def test_a_node_with_a_disk_of_its_own_has_room_for_a_tensor_more_where_it_has_memory_for_it() -> None:
    memory = 3631 - 31 * 40 + 70 + 37
    shared = need_of(complete(BESIDE, sharing_a_disk(memory, 4000, model=KNOWN)), "a")
    own = need_of(complete(BESIDE, sharing_a_disk(memory, 4000, model=KNOWN, disk="")), "a")
    assert own.buffer_bytes >= shared.buffer_bytes + 30 * MB
    assert own.pinned_bytes + own.buffer_bytes == shared.pinned_bytes + shared.buffer_bytes, "all of the memory is used"
    least = next(size for size in range(1, 1000) if _is_possible(size, ""))
    assert not _is_possible(least - 1, "d"), "nobody is refused for it"


def _is_possible(memory_mb: int, disk: str) -> bool:
    try:
        complete(BESIDE, sharing_a_disk(memory_mb, 4000, model=KNOWN, disk=disk))
    except PlanError:
        return False
    return True


def test_little_is_gathered_where_memory_is_little() -> None:
    assert complete(ALONE, problem_of(640)).gather_bytes == 20 * MB


def test_nothing_is_streamed_where_the_problem_does_not_want_it() -> None:
    with pytest.raises(PlanError, match=r"would need 3\.73 GB .* may use 2\.50 GB \(add a node"):
        complete(ALONE, problem_of(2500, streaming=False))


def test_too_little_memory_for_a_buffer_is_an_error_that_says_how_much_would_do() -> None:
    with pytest.raises(PlanError, match=r"as they are used it would need 0\.27 GB") as error:
        complete(ALONE, problem_of(150))
    assert "-c" in error.value.hint
    complete(ALONE, problem_of(280))


def test_of_two_nodes_only_the_one_that_is_too_small_streams() -> None:
    plan = complete(rounds(1, "ab"), problem_of(5000, 1000))
    assert need_of(plan, "a").streamed_bytes == need_of(plan, "a").buffer_bytes == 0
    assert need_of(plan, "b").streamed_bytes > 600 * MB


def test_an_embedding_that_is_looked_up_by_rows_goes_first_and_costs_no_reading() -> None:
    model = msgspec.structs.replace(MODEL, input_row_bytes=2000)
    need = need_of(complete(ALONE, problem_of(3600, model=model)), "a")
    assert (need.streamed_bytes, need.buffer_bytes) == (200 * MB, 0)
    plan = complete(ALONE, problem_of(3600, model=model))
    assert plan.gather_bytes == 0
    assert complete(plan, problem_of(3600, model=model)) == plan
    streaming = complete(ALONE, problem_of(2500, model=model, disk_bytes_s=1e9))
    [node] = predict(streaming, problem_of(2500, model=model, disk_bytes_s=1e9)).nodes
    need = need_of(streaming, "a")
    assert node.read_bytes == pytest.approx(need.streamed_bytes - 200 * MB)


def test_a_head_without_layers_streams_its_output_part_when_it_must() -> None:
    problem = problem_of(300, 5000, disk_bytes_s=1e9)
    plan = complete(Plan(32, "a", (Visit("b", 0, 32),)), problem)
    assert need_of(plan, "a").buffer_bytes == LEAST_BUFFER_BYTES
    forecast = predict(plan, problem)
    assert forecast.nodes[0].read_bytes == pytest.approx(need_of(plan, "a").streamed_bytes)


def test_an_output_part_cannot_be_streamed_through_a_buffer_that_holds_no_block_of_it() -> None:
    """`memory.store` would refuse what the plan says."""
    problem = problem_of(300, 5000)
    plan = Plan(32, "a", (Visit("b", 0, 32),))
    block = BLOCK_BYTES + ALIGNING_BYTES
    for size in (0, block - 1):
        said = Residency("a", "cpu", 0, 0, 500 * MB, size)
        with pytest.raises(PlanError, match=rf"through a buffer of {size} .*a buffer of {block} bytes at least"):
            complete(msgspec.structs.replace(plan, residency=(said,)), problem)
    said = Residency("a", "cpu", 0, 0, 500 * MB, block)
    done = complete(msgspec.structs.replace(plan, residency=(said,)), problem)
    assert need_of(done, "a").buffer_bytes == block


def test_without_rates_buffers_of_several_visits_are_guessed_and_no_time_is_foretold() -> None:
    problem = problem_of(2500, 2500, 1000, model=msgspec.structs.replace(MODEL, layer_bytes=(100 * MB,) * 48))
    once, twice = (complete(rounds(n, "abc", 48), problem) for n in (1, 2))
    assert need_of(twice, "c").buffer_bytes > need_of(once, "c").buffer_bytes
    assert (once.credit, twice.credit) == (4, 1)
    with pytest.raises(PlanError, match="no forecast: decode_bytes_s of cpu on a is not known"):
        predict(once, problem)


@pytest.mark.parametrize("n_rounds", [2, 4, 8])
def test_with_rates_the_buffer_is_about_the_best_one(n_rounds: int) -> None:
    problem = problem_of(5000, 1000, disk_bytes_s=2e9)
    plan = complete(rounds(n_rounds, "ab"), problem)
    need, token_s = need_of(plan, "b"), predict(plan, problem).token_s
    over = need.streamed_bytes - need.buffer_bytes
    tried = 0
    for size in range(need.buffer_bytes // 2, 3 * need.buffer_bytes, need.buffer_bytes // 10):
        other = msgspec.structs.replace(need, streamed_bytes=over + size, buffer_bytes=size)
        try:
            done = complete(msgspec.structs.replace(plan, residency=(other,)), problem)
        except PlanError:  # not even a layer fits
            continue
        tried += 1
        assert predict(done, problem).token_s >= 0.98 * token_s
    assert tried > 15


def test_a_device_with_its_own_memory_keeps_its_layers_while_the_cpu_streams() -> None:
    devices = (DeviceFacts("gpu", 1200 * MB, shares_host=False), DeviceFacts("cpu", 10_000 * MB))
    problem = msgspec.structs.replace(problem_of(0), nodes=(NodeFacts("a", 1500 * MB, devices),))
    plan = complete(Plan(32, "a", (Visit("a", 0, 32, (Split("gpu", 0, 6), Split("cpu", 6, 32))),)), problem)
    gpu, cpu = plan.residency
    assert (gpu.weight_bytes, gpu.streamed_bytes) == (1100 * MB, 0)
    assert cpu.pinned_bytes + cpu.buffer_bytes + cpu.kv_bytes + plan.gather_bytes == 1500 * MB
    with pytest.raises(PlanError, match="on gpu"):
        complete(Plan(32, "a", (Visit("a", 0, 32, (Split("gpu", 0, 12), Split("cpu", 12, 32))),)), problem)


def test_ends_too_large_for_every_device_lie_where_they_can_be_streamed() -> None:
    devices = (DeviceFacts("gpu", 300 * MB, shares_host=False), DeviceFacts("cpu", 10_000 * MB))
    nodes = (NodeFacts("a", 400 * MB, devices), NodeFacts("b", 9000 * MB))
    problem = msgspec.structs.replace(problem_of(0), nodes=nodes)
    plan = complete(Plan(32, "a", (Visit("b", 0, 32),)), problem)
    assert plan.end_device == "cpu"
    assert need_of(plan, "a").streamed_bytes > 100 * MB


def test_a_node_without_a_device_of_the_hosts_memory_cannot_stream() -> None:
    gpu = DeviceFacts("gpu", 1200 * MB, shares_host=False)
    problem = msgspec.structs.replace(problem_of(0), nodes=(NodeFacts("a", 1500 * MB, (gpu,)),))
    with pytest.raises(PlanError, match="on gpu"):
        complete(ALONE, problem)


# ---------------------------------------------------------------- experts

SPARSE = msgspec.structs.replace(
    MODEL, largest_tensor_bytes=MB, expert_bytes=(80 * MB,) * 32, n_experts=8, n_experts_used=2
)


def test_experts_are_streamed_first_and_only_the_chosen_ones_are_read() -> None:
    problem = problem_of(2500, model=SPARSE, disk_bytes_s=1e9)
    plan = complete(ALONE, problem)
    need = need_of(plan, "a")
    forecast = predict(plan, problem)
    assert forecast.nodes[0].read_bytes == pytest.approx(need.streamed_bytes / 4)
    assert forecast.nodes[0].compute_s == pytest.approx((32 * (20 + 20) + 500) * MB / 10e9)
    assert forecast.bound_s == pytest.approx(forecast.token_s)
    wide = predict(plan, problem, width=4).nodes[0].read_bytes
    assert wide == pytest.approx(need.streamed_bytes * (1 - 0.75**4))


# ---------------------------------------------------------------- what a plan says itself


def saying(streamed_mb: float, buffer_mb: float, device: str = "cpu", node: str = "a") -> Plan:
    residency = (Residency(node, device, 0, 0, int(streamed_mb * MB), int(buffer_mb * MB)),)
    return msgspec.structs.replace(ALONE, residency=residency)


def test_a_solver_may_say_what_is_streamed_also_where_all_would_fit() -> None:
    for problem in (problem_of(2500), problem_of(9000)):
        need = need_of(complete(saying(1600, 200), problem), "a")
        assert (need.streamed_bytes, need.buffer_bytes, need.weight_bytes) == (1600 * MB, 200 * MB, 3700 * MB)


def test_a_solver_that_says_it_says_also_what_is_gathered() -> None:
    assert complete(saying(1600, 200), problem_of(2500)).gather_bytes == 0
    asking = msgspec.structs.replace(saying(1600, 200), gather_bytes=100 * MB)
    assert complete(asking, problem_of(2500)).gather_bytes == 100 * MB
    too_much = msgspec.structs.replace(asking, gather_bytes=200 * MB)
    with pytest.raises(PlanError, match=r"would need 2\.33 GB .*buffer 0\.20.* may use 2\.30 GB"):
        complete(too_much, problem_of(2500))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (saying(3701, 200), "would stream 3701000000 bytes of 3700000000"),
        (saying(1600, -1), "through a buffer of -1000000"),
        (saying(1600, 109), r"through a buffer of 109000000 .*a buffer of 110000000 bytes at least"),
        (saying(1400, 200), r"would need 2\.53 GB .*let it stream 32000000 bytes more"),
        (saying(1600, 200, node="b"), "streams weights on 'cpu' of node 'b', which has none in it"),
        (saying(1600, 200, device="gpu"), "streams weights on 'gpu' of node 'a', which has none in it"),
    ],
)
def test_what_a_plan_says_must_be_possible(plan: Plan, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        complete(plan, problem_of(2500))


def test_what_a_plan_streams_must_be_wanted() -> None:
    with pytest.raises(PlanError, match="all are to stay in memory"):
        complete(saying(1600, 200), problem_of(2500, streaming=False))


# ---------------------------------------------------------------- forecasts


def test_a_forecast_adds_up() -> None:
    links = (LinkFacts("a", "b", 0.002, 1e6), LinkFacts(latency_s=0.001))
    model = msgspec.structs.replace(MODEL, activation_bytes=1000)
    problem = problem_of(1500, 1000, disk_bytes_s=1e9, model=model, links=links)
    plan = complete(rounds(2, "ab"), problem)
    forecast = predict(plan, problem)
    parts = sum(node.compute_s + node.stall_s + node.link_s for node in forecast.nodes)
    assert forecast.token_s == pytest.approx(parts)
    assert [node.link_s for node in forecast.nodes] == pytest.approx([0.002, 0.006])
    assert forecast.bound_s <= forecast.token_s
    assert forecast.token_s < 1.2 * forecast.bound_s
    assert "the disk of" in forecast.limit
    for node in forecast.nodes:
        need = need_of(plan, node.node)
        assert node.read_bytes == pytest.approx(need.streamed_bytes)
        assert (node.pinned_bytes, node.buffer_bytes) == (need.pinned_bytes, need.buffer_bytes)


def test_where_all_fits_a_token_takes_computing_and_links() -> None:
    problem = problem_of(9000, 9000, disk_bytes_s=1e9, links=(LinkFacts(latency_s=0.01),))
    forecast = predict(complete(rounds(1, "ab"), problem), problem)
    assert forecast.token_s == pytest.approx(0.37 + 0.02) == forecast.bound_s
    assert forecast.limit == "computing"
    assert predict(complete(ALONE, problem), problem).token_s == pytest.approx(0.37)
    slow = msgspec.structs.replace(problem, links=(LinkFacts(latency_s=1.0),))
    assert predict(complete(rounds(1, "ab"), slow), slow).limit == "links"


def test_chunks_of_a_prompt_follow_each_other_and_wait_where_one_step_goes_round() -> None:
    """A chunk of 128 tokens takes each of two nodes 0.683 s and the output part 0.05."""
    problem = problem_of(9000, 9000, disk_bytes_s=1e9)
    piped = complete(rounds(1, "ab"), problem)
    stage = 1600 * MB * 128 / 300e9
    assert predict(piped, problem, n_prompt=512, chunk=128).prompt_s == pytest.approx(5 * stage + 4 * 0.05, rel=0.01)
    alone = msgspec.structs.replace(piped, in_flight=1)
    assert predict(alone, problem, n_prompt=512, chunk=128).prompt_s == pytest.approx(4 * (2 * stage + 0.05), rel=0.01)


def test_a_streaming_node_reads_while_it_computes_a_prompt() -> None:
    problem = problem_of(2500, disk_bytes_s=1e9)
    plan = complete(ALONE, problem)
    fast = predict(plan, problem, n_prompt=128, chunk=128)
    assert fast.prompt_s is not None
    assert fast.prompt_s == pytest.approx(max(3200 * 128 / 300e3 + 0.05, fast.nodes[0].read_bytes / 1e9), rel=0.01)


def test_without_rates_of_prefill_only_tokens_are_foretold() -> None:
    device = DeviceFacts("cpu", 9000 * MB, decode_bytes_s=10e9)
    problem = msgspec.structs.replace(problem_of(0), nodes=(NodeFacts("a", 9000 * MB, (device,)),))
    plan = complete(ALONE, problem)
    assert predict(plan, problem).prompt_s is None
    with pytest.raises(PlanError, match="prefill_bytes_s of cpu on a"):
        predict(plan, problem, width=2)


def test_a_plan_that_streams_needs_the_rate_of_the_disk_and_only_that() -> None:
    known = problem_of(2500, disk_bytes_s=1e9)
    [node] = known.nodes
    unknown = msgspec.structs.replace(known, nodes=(msgspec.structs.replace(node, disk_bytes_s=0.0),))
    with pytest.raises(PlanError, match="disk_bytes_s of a"):
        predict(complete(ALONE, unknown), unknown)
    with pytest.raises(PlanError, match="`complete` it first"):
        predict(ALONE, known)


def test_forecasts_of_random_plans_keep_their_bounds() -> None:
    """Bytes read are bytes streamed; no time is below the formulas; memory is kept; more of it is never slower."""
    chance = random.Random(9)
    for _ in range(40):
        n_rounds, names = chance.choice((1, 2, 4)), chance.choice(("a", "ab", "abcd"))
        memory = [chance.randint(900, 4000) for _ in names]
        plan, times = rounds(n_rounds, names), []
        for extra in (0, 400):
            problem = problem_of(*(size + extra for size in memory), disk_bytes_s=1e9)
            done = complete(plan, problem)
            forecast = predict(done, problem)
            times.append(forecast.token_s)
            assert forecast.token_s >= forecast.bound_s * (1 - 1e-6)
            for node, size in zip(forecast.nodes, memory, strict=True):
                need = need_of(done, node.node)
                assert node.read_bytes == pytest.approx(need.streamed_bytes, rel=1e-6)
                assert need.pinned_bytes + need.buffer_bytes + need.kv_bytes <= (size + extra) * MB
        assert times[1] <= times[0] * 1.001
