"""Nodes load their part for an epoch, or say why not, and give it back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from prima_core.engine.engine import StepResult
from prima_core.errors import ClusterError, DeviceMemoryError, ModelError
from prima_core.plan.plan import Plan, Split, Visit
from prima_core.ring.reports import LoadFailed, Loading, Ready
from tests.ring.fakes import DEADLINE_S, FIRST, N_LAYERS, SMALL, Ring, after

if TYPE_CHECKING:
    from prima_core.model.weights import Model

MakeRing = Callable[..., Ring]


def test_a_load_tells_how_far_it_is_and_then_that_it_is_ready(ring_of: MakeRing) -> None:
    ring = ring_of("head")
    ring.workers["head"].load(ring.assignment(Plan(N_LAYERS, "head", (Visit("head", 0, 6),), kv_tokens=9)))
    reports = []
    while not isinstance(report := ring.report()[1], Ready):
        assert isinstance(report, Loading)
        reports.append(report)
    assert [report.done for report in reports] == sorted({report.done for report in reports})
    assert reports[-1].done == reports[-1].total > 0


def cannot_find() -> Model:
    raise ModelError("was not found here", hint="copy it")


def has_a_bug() -> Model:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("find", "kind", "message"),
    [(cannot_find, ModelError, "was not found here"), (has_a_bug, ClusterError, "ValueError: a bug")],
)
def test_a_load_without_a_model_fails_and_the_next_one_works(
    ring_of: MakeRing, find: Callable[[], Model], kind: type[Exception], message: str
) -> None:
    ring = ring_of("head", "b")
    plan = Plan(N_LAYERS, "head", (Visit("head", 0, 3), Visit("b", 3, 6)), kv_tokens=9)
    ring.workers["b"].load(replace(ring.assignment(plan), find_model=find))
    name, error = ring.load_error()
    assert name == "b"
    assert isinstance(error, kind)
    assert message in str(error)
    ring.load(("head", 0, 3), ("b", 3, 6), epoch=FIRST.next())


def test_a_backend_that_cannot_load_is_a_failed_load(ring_of: MakeRing) -> None:
    ring = ring_of("head")
    ring.backends["head"].breaks["load"] = DeviceMemoryError("too large")
    plan = Plan(N_LAYERS, "head", (Visit("head", 0, 6),), kv_tokens=9)
    ring.workers["head"].load(ring.assignment(plan))
    assert ring.load_error()[1].args == ("too large",)


def test_a_device_with_too_little_memory_is_told_with_what_it_has_when_all_was_given_back(ring_of: MakeRing) -> None:
    ring = ring_of("head")
    backend = ring.backends["head"]
    backend.memory_bytes = {"count:gpu": 1000, "count:cpu": 1000}
    backend.breaks["load on count:cpu"] = DeviceMemoryError("2 of the layers would fit")
    split = Split("count:gpu", 0, 3), Split("count:cpu", 3, 6)
    plan = Plan(N_LAYERS, "head", (Visit("head", 0, 6, split),), kv_tokens=9)
    ring.workers["head"].load(ring.assignment(plan))
    _, report = ring.outcome()
    assert isinstance(report, LoadFailed)
    assert (report.device, report.memory_bytes) == ("count:cpu", 1000)
    assert "2 of the layers" in str(report.error)
    assert backend.closed == ["shard"], "the part on the other device was given back"


def test_a_device_that_fails_and_cannot_be_asked_has_no_memory(
    ring_of: MakeRing, caplog: pytest.LogCaptureFixture
) -> None:
    ring = ring_of("head")
    backend = ring.backends["head"]
    backend.breaks["load on count:cpu"] = DeviceMemoryError("2 of the layers would fit")
    backend.breaks["devices after the load"] = OSError("the driver has gone")
    ring.workers["head"].load(ring.assignment(Plan(N_LAYERS, "head", (Visit("head", 0, 6),), kv_tokens=9)))
    _, report = ring.outcome()
    assert isinstance(report, LoadFailed)
    assert (report.device, report.memory_bytes) == ("count:cpu", 0)
    assert "the driver has gone" in caplog.text


def test_the_error_of_a_failed_load_keeps_nothing_of_it_alive(ring_of: MakeRing) -> None:
    ring = ring_of("head")
    ring.backends["head"].breaks["load"] = ModelError("is damaged")
    ring.workers["head"].load(ring.assignment(Plan(N_LAYERS, "head", (Visit("head", 0, 6),), kv_tokens=9)))
    _, error = ring.load_error()
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_what_a_failed_load_has_opened_is_closed(ring_of: MakeRing) -> None:
    ring = ring_of("head", "b")
    plan = Plan(N_LAYERS, "head", (Visit("head", 0, 3), Visit("b", 3, 6)), kv_tokens=9)
    ring.workers["head"].load(replace(ring.assignment(plan), addresses={}))
    assert "KeyError" in str(ring.load_error()[1])
    assert ring.backends["head"].closed == ["shard"]


def test_a_new_epoch_replaces_the_old_one(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.works()
    old = [frame for node, frame in ring.frames if node == "b"]
    ring.load(("head", 0, 4), ("b", 4, 6), epoch=FIRST.next())
    assert ring.backends["b"].closed == ["shard"]
    assert "c" in ring.closed_links
    ring.workers["b"].arrived(old[0])
    number = ring.launch(9, epoch=FIRST.next())
    assert ring.collect() == StepResult(number, ((9, after(9)),))
    assert caplog.records == []


def test_unload_gives_everything_back(ring: Ring) -> None:
    ring.workers["b"].unload()
    ring.workers["b"].stop()
    assert ring.backends["b"].closed == ["shard", "backend"]
    assert ring.closed_links == ["c"]


def test_a_load_that_is_given_up_is_not_told_as_a_failure(ring_of: MakeRing) -> None:
    ring = ring_of("head")
    plan = Plan(N_LAYERS, "head", (Visit("head", 0, 6),), kv_tokens=9)
    looking, found = threading.Event(), threading.Event()

    def find_slowly() -> Model:
        looking.set()
        assert found.wait(DEADLINE_S)
        return cast("Model", SMALL)

    ring.workers["head"].load(replace(ring.assignment(plan), find_model=find_slowly))
    assert looking.wait(DEADLINE_S)
    ring.workers["head"].load(ring.assignment(plan, FIRST.next()))
    found.set()
    assert ring.outcome() == ("head", Ready(FIRST.next()))


def test_a_backend_that_cannot_give_its_part_back_hinders_no_other_load(
    ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    ring.backends["b"].breaks["close"] = OSError("the driver has gone")
    ring.load(("head", 0, 4), ("b", 4, 6), epoch=FIRST.next())
    number = ring.launch(9, epoch=FIRST.next())
    assert ring.collect() == StepResult(number, ((9, after(9)),))
    assert "the driver has gone" in caplog.text
