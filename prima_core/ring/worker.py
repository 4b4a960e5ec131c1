"""A node's owner thread: it loads the node's part of a model and carries steps through it, one at a time.

Everything that touches a backend happens here (see `interfaces.Backend`). Frames come from the receive thread, which
has decoded them, and launches from the head's driver, through one bounded queue; what happened is told through
`report`, from the owner thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from prima_core.engine.engine import StepResult
from prima_core.engine.request import Sampled
from prima_core.engine.sampler import sample
from prima_core.engine.scheduler import PlannedStep, Wanted
from prima_core.errors import ClusterError, DeviceMemoryError, FrameError, LinkError, LinkTimeout, PrimaError
from prima_core.interfaces import Backend, Buffer, Device, Layers, SendLink, Shard, Slice, Step
from prima_core.memory.system import host
from prima_core.plan.plan import Plan
from prima_core.ring import wire
from prima_core.ring.loading import LoadingStore
from prima_core.ring.reports import Assignment, Collected, LoadFailed, Loading, Ready, Report, Unreachable
from prima_core.ring.times import Meter
from prima_core.ring.wire import Epoch, StaleEpoch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

UNREACHABLE_AFTER_S = 10.0
"""A node that takes no frame for so long, and yet is not lost by its silence, cannot be reached from here."""
MAX_QUEUED_JOBS = 1024  # more than any credit: a legal ring never fills it
STOP_WITHIN_S = 0.5
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Load:
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class _Unload:
    pass


@dataclass(frozen=True, slots=True)
class _Launch:
    epoch: Epoch
    planned: PlannedStep


@dataclass(frozen=True, slots=True)
class _Arrived:
    serving: _Serving
    frame: wire.Frame


_Job = _Load | _Unload | _Launch | _Arrived


@dataclass(slots=True)
class _Serving:
    """What is loaded now. `wanted` and `newest` are the only things that change from step to step."""

    assignment: Assignment
    first_device: str
    shards: Mapping[str, Shard]
    links: Mapping[str, SendLink]
    limits: wire.FrameLimits
    exits: ExitStack
    first_visit: int | None  # of this node in the plan
    wanted: dict[int, tuple[Wanted, ...]] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)  # per visit: the last step number seen

    def take_wanted(self, number: int) -> tuple[Wanted, ...]:
        """What is wanted of a step that has come back. Those before it that have not were lost on their way."""
        wanted = self.wanted.pop(number, ())
        for lost in [other for other in self.wanted if other < number]:
            del self.wanted[lost]
        return wanted


class Worker:
    """The owner thread. `name` is the node's name in plans; `open_backend` is called in the thread."""

    def __init__(
        self,
        name: str,
        open_backend: Callable[[], Backend],
        dial: Callable[[str], SendLink],
        report: Callable[[Report], None],
    ) -> None:
        self.name = name
        self._open_backend = open_backend
        self._dial = dial
        self._report = report
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()  # a third faster than Queue; `_put` bounds it
        self._ordered: Epoch | None = None  # what was ordered last, which the thread may not have read yet
        self._stopping = threading.Event()
        self._opened: Future[tuple[Device, ...]] = Future()
        self._serving: _Serving | None = None
        self.meter = Meter()
        self._thread = threading.Thread(target=self._main, name=f"prima-owner-{name}", daemon=True)

    # ------------------------------------------------------------ called from other threads

    def start(self) -> tuple[Device, ...]:
        """Open the backend and return its devices, best first. Raises what opening it raised."""
        self._thread.start()
        return self._opened.result()

    def load(self, assignment: Assignment) -> None:
        """Give up what is loaded and load this; ends in a report Ready or LoadFailed."""
        self._ordered = assignment.epoch
        self._put(_Load(assignment))

    def unload(self) -> None:
        self._ordered = None
        self._put(_Unload())

    def launch(self, epoch: Epoch, planned: PlannedStep) -> None:
        """Start a step at the input part (only on the head's node)."""
        self._put(_Launch(epoch, planned))

    def arrived(self, data: memoryview) -> None:
        """A message from the wire. What is no frame of the present epoch is dropped at once: only the plan's nodes can
        fill the queue. Blocks while it is full, which holds only the sender up."""
        serving = self._serving
        if serving is None:
            return
        start = time.perf_counter()
        try:
            frame = wire.decode(data, serving.limits)
        except StaleEpoch:
            return
        except FrameError as error:
            self._drop(error)
            return
        self.meter.decode_s += time.perf_counter() - start
        self._put(_Arrived(serving, frame))

    def stop(self) -> None:
        """End the thread and free what is loaded; a step that takes longer than STOP_WITHIN_S is left behind."""
        self._stopping.set()
        self._jobs.put(_Unload())  # wakes it
        if self._thread.is_alive():
            self._thread.join(STOP_WITHIN_S)

    def _put(self, job: _Job) -> None:
        while self._jobs.qsize() >= MAX_QUEUED_JOBS:
            if self._stopping.wait(_POLL_S):
                return
        self._jobs.put(job)

    # ------------------------------------------------------------ the owner thread

    def _main(self) -> None:
        try:
            backend = self._open_backend()
            devices = tuple(backend.devices())
        except BaseException as error:  # noqa: BLE001 - handed to `start`, which raises it
            self._opened.set_exception(error)
            return
        self._opened.set_result(devices)
        try:
            while not self._stopping.is_set():
                self._do(backend, self._next_job())
        finally:
            self._stopping.set()
            self._give_up()
            backend.close()

    def _next_job(self) -> _Job:
        start = time.perf_counter()
        job = self._jobs.get()
        if self._was_awaited(job):
            self.meter.wait_s += time.perf_counter() - start
        return job

    def _was_awaited(self, job: _Job) -> bool:
        """Whether a request was running while there was nothing to do here: see `NodeTimes.wait_s`."""
        serving = self._serving
        if serving is None or not isinstance(job, (_Launch, _Arrived)):
            return False
        if isinstance(job, _Launch) or serving.assignment.plan.head == self.name:
            return bool(serving.wanted)
        begun_here = {op.sequence for op in job.frame.step.kv}
        return any(chunk.sequence not in begun_here for chunk in job.frame.step.chunks)

    def _do(self, backend: Backend, job: _Job) -> None:
        try:
            match job:
                case _Arrived(serving, frame):
                    self._receive(serving, frame)
                case _Launch(epoch, planned):
                    self._start_step(epoch, planned)
                case _Load(assignment):
                    self._give_up()
                    self._load(backend, assignment)
                case _Unload():
                    self._give_up()
        except Exception:  # thread top: a node that goes on answering heartbeats must not be deaf
            log.exception("node %s failed", self.name)

    def _receive(self, serving: _Serving, frame: wire.Frame) -> None:
        if serving is not self._serving:
            return  # its epoch was given up while it waited
        try:
            self._check_place(serving, frame)
        except FrameError as error:
            self._drop(error)
            return
        if frame.error is not None:
            self._pass_on_error(serving, frame.number, frame.visit, frame.error)
        else:
            self._advance(serving, frame.number, frame.visit, frame.step, frame.activation)

    def _drop(self, error: FrameError) -> None:
        log.warning("node %s dropped a frame: %s", self.name, error)

    def _check_place(self, serving: _Serving, frame: wire.Frame) -> None:
        """A frame must be for a visit of this node (or for the output part on the head), and newer than the last."""
        plan = serving.assignment.plan
        here = plan.head if frame.visit == len(plan.visits) else plan.visits[frame.visit].node
        if here != self.name:
            raise FrameError(f"visit {frame.visit} belongs to node {here!r}, not to {self.name!r}")
        if frame.number <= serving.newest.get(frame.visit, 0):
            raise FrameError(f"step {frame.number} came twice or late to visit {frame.visit}")
        if frame.visit == len(plan.visits) and frame.number not in serving.wanted:
            raise FrameError(f"step {frame.number} was never launched")
        serving.newest[frame.visit] = frame.number

    def _start_step(self, epoch: Epoch, planned: PlannedStep) -> None:
        serving = self._serving
        if serving is None or serving.assignment.epoch != epoch:
            return
        serving.wanted[planned.number] = planned.wanted
        start = time.perf_counter()
        try:
            activation = self._end_shard(serving).embed(planned.step)
            self.meter.computed_since(start)
        except Exception as error:  # noqa: BLE001 - the border of a step: it fails, the node lives
            self._fail_step(serving, planned.number, 0, error)
            return
        self._advance(serving, planned.number, 0, planned.step, activation)

    def _advance(self, serving: _Serving, number: int, index: int, step: Step, activation: NDArray[np.float32]) -> None:
        """Run this node's visits from `index` on, then hand the step to the next node or to the output part."""
        visits = serving.assignment.plan.visits
        try:
            while index < len(visits) and visits[index].node == self.name:
                activation = self._visit(serving, index, activation, step)
                index += 1
            if index == len(visits) and serving.assignment.plan.head == self.name:
                self._finish(serving, number, activation)
                return
            start = time.perf_counter()
            frame = wire.encode_activation(
                serving.assignment.epoch, number, index, step, activation, serving.assignment.wire.dtype(step)
            )
            self.meter.send_s += time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - the border of a step: it fails, the node lives
            self._fail_step(serving, number, index, error)
            return
        self._send(serving, index, frame)

    def _visit(self, serving: _Serving, index: int, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        start = time.perf_counter()
        for part in serving.assignment.plan.visits[index].parts(serving.first_device):
            activation = serving.shards[part.device].run(part.layers, activation, step)
        self.meter.computed_since(start)
        if index == serving.first_visit:
            self.meter.n_steps += 1
            self.meter.n_tokens += step.n_tokens
        return activation

    def _finish(self, serving: _Serving, number: int, activation: NDArray[np.float32]) -> None:
        """The output part: logits of the wanted rows, one token each."""
        wanted = serving.take_wanted(number)
        tokens: tuple[tuple[int, Sampled | PrimaError], ...] = ()
        if wanted:
            start = time.perf_counter()
            logits = self._end_shard(serving).logits(activation, [want.row for want in wanted])
            tokens = tuple((want.sequence, _sampled(row, want)) for want, row in zip(wanted, logits, strict=True))
            self.meter.computed_since(start)
        self._report(Collected(serving.assignment.epoch, StepResult(number, tokens)))

    def _fail_step(self, serving: _Serving, number: int, index: int, error: Exception) -> None:
        is_ours = isinstance(error, PrimaError)
        log.error("node %s failed in step %d: %s", self.name, number, error, exc_info=None if is_ours else error)
        message = str(error) if is_ours else f"{type(error).__name__}: {error}"
        self._pass_on_error(serving, number, index, f"node {self.name!r}: {message}")

    def _pass_on_error(self, serving: _Serving, number: int, index: int, message: str) -> None:
        """Tell the head along the ring, behind the steps before it, so that nothing overtakes."""
        plan = serving.assignment.plan
        while index < len(plan.visits) and plan.visits[index].node == self.name:
            index += 1
        if index == len(plan.visits) and plan.head == self.name:
            serving.take_wanted(number)
            result = StepResult(number, error=ClusterError(message, hint="see the log of that node"))
            self._report(Collected(serving.assignment.epoch, result))
            return
        self._send(serving, index, wire.encode_error(serving.assignment.epoch, number, index, message))

    def _send(self, serving: _Serving, index: int, frame: list[Buffer]) -> None:
        """Until it is taken, or this epoch is to be given up: by then the head has noticed a node that is lost."""
        plan, epoch = serving.assignment.plan, serving.assignment.epoch
        successor = plan.head if index == len(plan.visits) else plan.visits[index].node
        deadline = time.monotonic() + UNREACHABLE_AFTER_S
        start = time.perf_counter()
        while self._is_wanted(epoch):
            try:
                serving.links[successor].send(frame, _POLL_S)
                self.meter.send_s += time.perf_counter() - start
                self.meter.sent_bytes += sum(memoryview(part).nbytes for part in frame)
                return
            except LinkError as error:
                if not isinstance(error, LinkTimeout) or time.monotonic() > deadline:
                    log.error("node %s cannot send to %s: %s", self.name, successor, error)
                    self._report(Unreachable(epoch, successor, error))
                    return

    def _end_shard(self, serving: _Serving) -> Shard:
        """The shard that has the input and the output part."""
        return serving.shards[serving.assignment.plan.end_device or serving.first_device]

    # ------------------------------------------------------------ loading

    def _load(self, backend: Backend, assignment: Assignment) -> None:
        try:
            with ExitStack() as exits:
                serving = self._open_serving(backend, assignment, exits)
                serving.exits = exits.pop_all()
        except Exception as error:  # noqa: BLE001 - the border of a load: it fails, the node lives
            fault = self._load_error(error)
            if self._is_wanted(assignment.epoch):
                device = fault.device if isinstance(fault, DeviceMemoryError) else ""
                self._report(LoadFailed(assignment.epoch, fault, device, self._free_bytes(backend, device)))
            return
        self._serving = serving
        self._report(Ready(assignment.epoch))

    def _load_error(self, error: Exception) -> PrimaError:
        """Without the frames that it came through: they hold what was loaded, as long as somebody keeps the error."""
        if not isinstance(error, PrimaError):
            log.error("node %s could not load", self.name, exc_info=error)
            return ClusterError(f"{type(error).__name__}: {error}", hint="see the log of that node")
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error

    def _free_bytes(self, backend: Backend, device: str) -> int:
        try:
            return sum(known.memory_bytes for known in backend.devices() if known.id == device)
        except Exception as error:  # noqa: BLE001 - the border to a backend whose device has just failed
            log.error("node %s: the devices do not tell their memory: %s", self.name, error)
            return 0

    def _open_serving(self, backend: Backend, assignment: Assignment, exits: ExitStack) -> _Serving:
        plan, model = assignment.plan, assignment.find_model()
        spec, mapped = model.spec, model.store()
        exits.callback(mapped.close)
        first_device = backend.devices()[0].id
        end_device = (plan.end_device or first_device) if plan.head == self.name else None
        slices = _slices(plan, self.name, first_device, end_device)
        store = LoadingStore(mapped, spec, tuple(slices.values()), partial(self._tell_loading, assignment), host())
        shards: dict[str, Shard] = {}
        for device, part in slices.items():
            try:
                shards[device] = backend.load(spec, device, part, store)
            except DeviceMemoryError as error:
                error.device = device
                raise
            exits.callback(shards[device].close)
        self.meter.disk_s += store.disk_s
        links: dict[str, SendLink] = {}
        for node in plan.successors(self.name):
            links[node] = self._dial(assignment.addresses[node])
            exits.callback(links[node].close)
        limits = wire.FrameLimits(
            epoch=assignment.epoch, d_model=spec.d_model, n_visits=len(plan.visits), max_tokens=plan.kv_tokens
        )
        first_visit = next((index for index, visit in enumerate(plan.visits) if visit.node == self.name), None)
        return _Serving(assignment, first_device, shards, links, limits, exits, first_visit)

    def _tell_loading(self, assignment: Assignment, done: int, total: int) -> None:
        if not self._is_wanted(assignment.epoch):
            raise ClusterError("the load was given up")
        self._report(Loading(assignment.epoch, done, total))

    def _is_wanted(self, epoch: Epoch) -> bool:
        """False when something else was ordered meanwhile: what takes long need not go on."""
        return self._ordered == epoch and not self._stopping.is_set()

    def _give_up(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.exits.close()


def _sampled(logits: NDArray[np.float32], want: Wanted) -> Sampled | PrimaError:
    """The token, or why there is none: a row that cannot be sampled hurts no other one."""
    try:
        return sample(logits, want)
    except PrimaError as error:
        return error


def _slices(plan: Plan, node: str, first_device: str, end_device: str | None) -> dict[str, Slice]:
    """The part of each of the node's devices that has one; `end_device` has the ends of the model."""
    layers: dict[str, list[Layers]] = {} if end_device is None else {end_device: []}
    for visit in plan.visits:
        if visit.node == node:
            for part in visit.parts(first_device):
                layers.setdefault(part.device, []).append(part.layers)
    slices: dict[str, Slice] = {}
    for device, ranges in layers.items():
        is_end = device == end_device
        slices[device] = Slice(tuple(ranges), is_end, is_end, plan.kv_type, plan.context, plan.kv_tokens)
    return slices
