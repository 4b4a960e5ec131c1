"""Owner threads of several nodes, with a backend that only counts: frames, faults, epochs."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.engine.engine import StepResult
from prima_core.errors import DeviceMemoryError, LinkBroken, ModelError
from prima_core.interfaces import Backend, Chunk, Device, KvKind, KvOp, KvType, Layers, SendLink, Slice, Step
from prima_core.memory.system import host
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.ring import carry, wire, worker
from prima_core.ring.reports import Assignment, Ready, Report, Unreachable
from prima_core.ring.wire import Epoch, WireDtype, WirePolicy
from prima_core.ring.worker import Worker
from tests.ring.fakes import DEADLINE_S, FIRST, N_LAYERS, SMALL, CountingBackend, FakeStore, Ring, after, rows_for

if TYPE_CHECKING:
    from prima_core.model.weights import Model

MakeRing = Callable[..., Ring]


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "visits",
    [
        [("head", 0, 6)],
        [("head", 0, 1), ("head", 1, 6)],
        [("b", 0, 6)],
        [("b", 0, 2), ("c", 2, 6)],
        [("head", 0, 1), ("b", 1, 5), ("c", 5, 6)],
        [("c", 0, 1), ("b", 1, 2), ("b", 2, 4), ("head", 4, 5), ("c", 5, 6)],
        [("b", 0, 1), ("c", 1, 2), ("b", 2, 3), ("c", 3, 4), ("b", 4, 5), ("c", 5, 6)],
    ],
    ids=lambda visits: " ".join(f"{node}:{start}-{stop}" for node, start, stop in visits),
)
def test_a_step_goes_through_all_visits_in_order(ring_of: MakeRing, visits: list[tuple[str, int, int]]) -> None:
    ring = ring_of("head", "b", "c")
    ring.load(*visits)
    assert ring.answer(3, 11).tokens == ((3, after(3)), (11, after(11)))
    for name, backend in ring.backends.items():
        assert [layers for layers, _ in backend.steps] == [Layers(a, b) for node, a, b in visits if node == name]


def test_every_part_gets_the_type_of_kv_and_the_context_of_the_plan(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b")
    ring.load(("head", 0, 2), ("b", 2, 6), kv_type=KvType.Q8_0, context=77)
    assert ring.backends["head"].parts == [Slice((Layers(0, 2),), True, True, KvType.Q8_0, 77, 1000)]
    assert ring.backends["b"].parts == [Slice((Layers(2, 6),), False, False, KvType.Q8_0, 77, 1000)]


def test_a_visit_goes_through_the_devices_of_its_split_and_kv_with_it(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b")
    backend = ring.backends["b"]
    backend.memory_bytes = {"count:gpu": 1000, "count:cpu": 1000, "count:spare": 1000}
    split = Split("count:cpu", 1, 2), Split("count:gpu", 2, 4), Split("count:cpu", 4, 5)
    ring.load(("head", 0, 1), Visit("b", 1, 5, split), ("b", 5, 6))
    parts = {device: part.layers for device, part in zip(backend.used, backend.parts, strict=True)}
    assert parts == {"count:cpu": (Layers(1, 2), Layers(4, 5)), "count:gpu": (Layers(2, 4), Layers(5, 6))}
    assert ring.works()
    assert [layers for layers, _ in backend.steps] == [Layers(1, 2), Layers(2, 4), Layers(4, 5), Layers(5, 6)]
    kv = (KvOp(KvKind.OPEN, 1, capacity=9),)
    ring.launch(kv=kv)
    ring.collect()
    assert [step.kv for _, step in backend.steps[4:]] == [kv] * 4


def test_a_device_without_layers_is_not_loaded(ring_of: MakeRing) -> None:
    """On a worker also the first one; on the head that with the ends of the model, without layers or not."""
    ring = ring_of("head", "b")
    for name in ("head", "b"):
        ring.backends[name].memory_bytes = {"count:gpu": 1000, "count:cpu": 1000, "count:spare": 1000}
    ring.load(Visit("b", 0, 3, (Split("count:cpu", 0, 3),)), ("head", 3, 6), end_device="count:cpu")
    assert ring.backends["b"].used == ["count:cpu"]
    head = dict(zip(ring.backends["head"].used, ring.backends["head"].parts, strict=True))
    assert {device: (part.layers, part.has_input, part.has_output) for device, part in head.items()} == {
        "count:cpu": ((), True, True),
        "count:gpu": ((Layers(3, 6),), False, False),
    }
    assert ring.works()


def test_several_steps_in_flight_come_back_in_order(ring: Ring) -> None:
    numbers = [ring.launch(token) for token in range(1, 20)]
    assert [ring.collect().number for _ in numbers] == numbers


def test_a_step_of_which_nothing_is_wanted_comes_back_without_tokens(ring: Ring) -> None:
    number = ring.launch(3, wants=False)
    assert ring.collect() == StepResult(number)


def test_changes_of_kv_reach_every_visit_also_without_tokens(ring: Ring) -> None:
    kv = (KvOp(KvKind.OPEN, 1, capacity=9), KvOp(KvKind.DROP, 1))
    number = ring.launch(kv=kv)
    assert ring.collect() == StepResult(number)
    for backend in ring.backends.values():
        assert {step.kv for _, step in backend.steps} == {kv}


def test_workers_see_no_token_ids(ring: Ring) -> None:
    ring.answer(3)
    assert [step.tokens for _, step in ring.backends["b"].steps] == [()]


@pytest.mark.parametrize("policy", WirePolicy)
@pytest.mark.parametrize("token", [5, 9000], ids=["values that fit f16", "values that do not"])
def test_every_wire_type_carries_what_it_can(ring_of: MakeRing, policy: WirePolicy, token: int) -> None:
    ring = ring_of("head", "b")
    ring.load(("head", 0, 5), ("b", 5, 6), wire=policy)
    assert ring.answer(token).tokens == ((token, after(token)),)


def test_every_sampled_row_has_its_own_outcome(ring: Ring) -> None:
    def change(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[0] = np.nan
        return logits

    ring.backends["head"].change_logits = change
    (first, wrong), (second, token) = ring.answer(3, 11).tokens
    assert (first, second, token) == (3, 11, after(11))
    assert isinstance(wrong, ModelError)


# ---------------------------------------------------------------- frames that should not be


def frame_for(
    visit: int, number: int = 1, epoch: Epoch = FIRST, sequence: int = 7, columns: int = SMALL.spec.d_model
) -> bytes:
    activation = np.zeros((1, columns), np.float32)
    step = Step((Chunk(sequence, 0, 1),))
    return b"".join(wire.encode_activation(epoch, number, visit, step, activation, WireDtype.F32))


def error_for(visit: int, number: int) -> bytes:
    return b"".join(wire.encode_error(FIRST, number, visit, "invented"))


@pytest.mark.parametrize(
    ("node", "frame", "complaint"),
    [
        ("b", b"", "at least"),
        ("b", b"GET / HTTP/1.1\r\n\r\n" + bytes(100), "not a data frame"),
        ("b", bytes(100_000), "not a data frame"),
        ("b", frame_for(1)[:-1], "bytes"),
        ("b", frame_for(1) + b"x", "bytes"),
        ("b", frame_for(1, columns=8), "columns"),
        ("b", frame_for(0, 99), "belongs to node 'head'"),
        ("b", frame_for(2, 99), "belongs to node 'c'"),
        ("b", rows_for(4, 99), "belongs to node 'head'"),
        ("b", frame_for(4, 99), "no tables"),
        ("b", frame_for(5, 99), "not one of the plan's"),
        ("b", error_for(2, 99), "belongs to node 'c'"),
        ("head", rows_for(4, 99), "never launched"),
        ("head", error_for(4, 99), "never launched"),
    ],
)
def test_a_frame_that_has_no_place_is_dropped_and_logged(
    ring_of: MakeRing, caplog: pytest.LogCaptureFixture, node: str, frame: bytes, complaint: str
) -> None:
    ring = ring_of("head", "b", "c")
    ring.load(("head", 0, 1), ("b", 1, 3), ("c", 3, 5), ("b", 5, 6))
    ring.workers[node].arrived(memoryview(frame))
    assert ring.works()
    assert complaint in caplog.text


@pytest.mark.parametrize("epoch", [Epoch(FIRST.run_id, 2), Epoch(FIRST.run_id, 0), Epoch(99, 1)], ids=str)
def test_a_frame_of_another_epoch_is_dropped_in_silence(
    ring: Ring, caplog: pytest.LogCaptureFixture, epoch: Epoch
) -> None:
    ring.workers["b"].arrived(memoryview(frame_for(1, epoch=epoch)))
    assert ring.works()
    assert caplog.records == []


def test_a_frame_that_comes_twice_is_run_once(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.works()
    n_steps = len(ring.backends["b"].steps)
    for node, frame in list(ring.frames):
        ring.workers[node].arrived(frame)
    assert ring.works()
    assert len(ring.backends["b"].steps) == n_steps + 1
    assert caplog.text.count("twice or late") == 3


def test_a_frame_that_comes_late_is_not_run(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.works()
    late = next(frame for node, frame in ring.frames if node == "c")
    ring.works()
    ring.workers["c"].arrived(late)
    assert ring.works()
    assert "step 1 came twice or late" in caplog.text


def test_frames_before_the_first_load_are_dropped(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b")
    for frame in (frame_for(1), b"nonsense"):
        ring.workers["b"].arrived(memoryview(frame))
    ring.load(("head", 0, 3), ("b", 3, 6))
    assert ring.works()


def test_a_flood_of_foreign_frames_takes_no_place_in_the_queue(ring: Ring) -> None:
    for _ in range(3 * worker.MAX_QUEUED_JOBS):
        ring.workers["b"].arrived(memoryview(b"x" * 100))
    assert ring.workers["b"]._jobs.empty()


def test_a_launch_of_another_epoch_is_nothing(ring: Ring) -> None:
    ring.launch(3, epoch=Epoch(FIRST.run_id, 2))
    assert ring.works()


def test_a_lost_step_is_not_waited_for_once_a_later_one_is_back(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ring.works()
    with monkeypatch.context() as lossy:
        lossy.setattr(ring.workers["b"], "arrived", lambda frame: ring.waited.set())
        ring.launch(3)
        assert ring.waited.wait(DEADLINE_S)
    assert ring.works()
    serving = ring.workers["head"]._serving
    assert serving is not None
    assert serving.wanted == {}


# ---------------------------------------------------------------- steps that fail


@pytest.mark.parametrize(
    ("node", "call"), [("head", "embed"), ("head", "run"), ("b", "run"), ("c", "run"), ("head", "logits")]
)
@pytest.mark.parametrize("error", [DeviceMemoryError("no memory for the KV"), ValueError("a bug")], ids=str)
def test_a_step_that_fails_says_where_and_the_next_one_goes_through(
    ring: Ring, node: str, call: str, error: Exception
) -> None:
    ring.backends[node].breaks[call] = error
    number = ring.launch(7)
    ring.launch(8)
    failed, good = ring.collect(), ring.collect()
    assert (failed.number, failed.tokens) == (number, ())
    assert f"node {node!r}: " in str(failed.error)
    assert str(error) in str(failed.error)
    assert good.tokens == ((8, after(8)),)


def test_the_nodes_behind_one_that_failed_do_not_run_the_step(ring: Ring) -> None:
    ring.backends["b"].breaks["run"] = ValueError("a bug")
    ring.answer(7)
    assert ring.backends["c"].steps == []
    assert [layers for layers, _ in ring.backends["head"].steps] == [Layers(0, 1)]


def test_a_node_logs_its_failures(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.backends["b"].breaks["run"] = ValueError("a bug")
    ring.answer(7)
    assert "node b failed in step 1: a bug" in caplog.text
    assert "Traceback" in caplog.text


# ---------------------------------------------------------------- nodes that take no frames


def test_a_node_that_takes_no_frames_is_told_after_a_while(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "UNREACHABLE_AFTER_S", 0.01)
    ring.deaf.add("c")
    ring.launch(3)
    name, report = ring.outcome()
    assert isinstance(report, Unreachable)
    assert (name, report.epoch, report.node) == ("b", FIRST, "c")
    assert "does not read" in str(report.error)


def test_a_send_to_a_dead_node_ends_when_another_plan_is_ordered(ring: Ring) -> None:
    ring.deaf.add("c")
    ring.launch(3)
    assert ring.waited.wait(DEADLINE_S)
    ring.load(("head", 0, 4), ("b", 4, 6), epoch=FIRST.next())


def test_a_send_to_a_dead_node_does_not_hold_up_the_end(ring: Ring) -> None:
    ring.deaf.add("c")
    ring.launch(3)
    assert ring.waited.wait(DEADLINE_S)
    ring.workers["b"].stop()
    assert not ring.workers["b"]._thread.is_alive()


# ---------------------------------------------------------------- the thread


def alone(backend: Callable[[], Backend], report: Callable[[Report], None] = lambda report: None) -> Worker:
    def dial(address: str) -> SendLink:
        raise LinkBroken(address)

    return Worker("alone", backend, dial, report, host(), lambda model, holding, system: FakeStore(SMALL, holding))


def test_a_backend_that_does_not_open_is_told_to_who_starts_the_node() -> None:
    def fail() -> Backend:
        raise ModelError("cannot open")

    with pytest.raises(ModelError, match="cannot open"):
        alone(fail).start()


def test_a_backend_that_cannot_tell_its_devices_does_not_hang_who_starts_the_node() -> None:
    class Mute(CountingBackend):
        def devices(self) -> list[Device]:
            raise RuntimeError("no devices")

    with pytest.raises(RuntimeError, match="no devices"):
        alone(Mute).start()


def test_stop_may_be_called_twice_and_before_start() -> None:
    worker = alone(CountingBackend)
    worker.stop()
    worker.stop()


def test_nothing_hangs_on_a_worker_that_was_stopped(ring: Ring) -> None:
    ring.workers["b"].stop()
    for _ in range(2 * worker.MAX_QUEUED_JOBS):
        ring.workers["b"].arrived(memoryview(frame_for(1)))
    ring.workers["b"].unload()


def test_a_report_that_fails_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    reports: queue.Queue[Report] = queue.Queue()

    def report(said: Report) -> None:
        reports.put(said)
        if isinstance(said, Ready) and said.epoch == FIRST:
            raise RuntimeError("cannot tell")

    node = alone(CountingBackend, report)
    node.start()
    plan = Plan(N_LAYERS, "alone", (Visit("alone", 0, 6),), kv_tokens=9)
    for epoch in (FIRST, FIRST.next()):
        node.load(Assignment(epoch, plan, lambda: cast("Model", SMALL), WirePolicy.F32, {}))
        while not isinstance(said := reports.get(timeout=DEADLINE_S), Ready):
            pass
        assert said.epoch == epoch
    node.stop()
    assert "cannot tell" in caplog.text


def test_devices_that_cannot_be_asked_are_measured_as_not_known() -> None:
    backend = CountingBackend()
    node = alone(lambda: backend)
    node.start()
    backend.calls.add("load")
    backend.breaks["devices after the load"] = OSError("the driver has gone")
    assert node.measure(cast("Model", SMALL), 1000, lambda: False).result(DEADLINE_S) == {}
    node.stop()
