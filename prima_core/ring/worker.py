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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

from prima_core.engine.scheduler import PlannedStep
from prima_core.errors import ClusterError, DeviceMemoryError, FrameError, PrimaError
from prima_core.interfaces import Backend, Device, SendLink, Step
from prima_core.memory.system import System
from prima_core.model.weights import Model
from prima_core.plan.profile import DeviceRates
from prima_core.ring import wire
from prima_core.ring.carry import Carrier
from prima_core.ring.gather import Gather
from prima_core.ring.rates import Bench, decode_rate, device_rates
from prima_core.ring.reports import Assignment, LoadFailed, Loading, Ready, Report
from prima_core.ring.serving import Means, OpenStore, Serving, open_serving, open_store
from prima_core.ring.times import Meter
from prima_core.ring.wire import Epoch, StaleEpoch

log = logging.getLogger(__name__)

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
class _Measure:
    model: Model
    memory_bytes: int
    stop: Callable[[], bool]
    is_brief: bool
    result: Future[dict[str, DeviceRates]]


@dataclass(frozen=True, slots=True)
class _Launch:
    epoch: Epoch
    planned: PlannedStep


@dataclass(frozen=True, slots=True)
class _Arrived:
    serving: Serving
    frame: wire.Frame


_Job = _Load | _Unload | _Measure | _Launch | _Arrived


class Worker:
    """The owner thread. `name` is the node's name in plans; what opens is called in the thread."""

    def __init__(
        self,
        name: str,
        open_backend: Callable[[], Backend],
        dial: Callable[[str], SendLink],
        report: Callable[[Report], None],
        system: System,
        open_store: OpenStore = open_store,
    ) -> None:
        self.name = name
        self._open_backend = open_backend
        self._dial = dial
        self._report = report
        self._system = system
        self._open_store = open_store
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()  # a third faster than Queue; `_put` bounds it
        self._waiting: deque[_Job] = deque()  # taken out of it already, the owner thread's
        self._ordered: Epoch | None = None  # what was ordered last, which the thread may not have read yet
        self._stopping = threading.Event()
        self._opened: Future[tuple[Device, ...]] = Future()
        self._serving: Serving | None = None
        self._carrier: Carrier | None = None  # of `_serving`
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

    def measure(
        self, model: Model, memory_bytes: int, stop: Callable[[], bool], is_brief: bool = False
    ) -> Future[dict[str, DeviceRates]]:
        """How fast each device computes this model's layers, as far as that can be found out with so much of the host's
        memory; nothing may be loaded meanwhile. `is_brief`: only a token at a time. `stop`, asked again and again, ends
        it early; so does the end of the thread. The model has to stay open until the result is there."""
        result: Future[dict[str, DeviceRates]] = Future()
        self._put(_Measure(model, memory_bytes, lambda: stop() or self._stopping.is_set(), is_brief, result))
        return result

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
            log.warning("node %s dropped a frame: %s", self.name, error)
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
                self._do(backend, self._next_jobs())
        finally:
            self._stopping.set()
            self._give_up()
            backend.close()

    def _next_jobs(self) -> list[_Job]:
        """The next job, and where weights come from disk what can be done together with it."""
        job = self._waiting.popleft() if self._waiting else self._next_job()
        serving = self._serving
        if serving is None or not serving.max_gather or not _is_step(job):
            return [job]
        while len(self._waiting) < MAX_QUEUED_JOBS and not self._jobs.empty():
            self._waiting.append(self._jobs.get())  # this thread alone takes, so what is there stays there
        return [job, *self._take_along(job, Gather(serving.max_gather))]

    def _take_along(self, first: _Job, gather: Gather) -> list[_Job]:
        """Of what waits, in order, steps for the same visit; none behind one that does not go along."""
        gather.take(_step_of(first))
        taken: list[_Job] = []
        left: list[_Job] = []
        is_open = True
        for job in self._waiting:
            is_alike = _place(job) == _place(first)
            is_open = is_open and (not is_alike or (_is_step(job) and gather.take(_step_of(job))))
            (taken if is_open and is_alike else left).append(job)
        self._waiting = deque(left)
        return taken

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

    def _do(self, backend: Backend, jobs: list[_Job]) -> None:
        try:
            match jobs[0]:
                case _Arrived(serving):
                    if self._carrier is not None and serving is self._serving:  # else it was given up meanwhile
                        self._carrier.receive([job.frame for job in jobs if isinstance(job, _Arrived)])
                case _Launch(epoch):
                    if self._carrier is not None and epoch == self._carrier.epoch:
                        self._carrier.start([job.planned for job in jobs if isinstance(job, _Launch)])
                case _Load(assignment):
                    self._give_up()
                    self._load(backend, assignment)
                case _Unload():
                    self._give_up()
                case _Measure() as measure:
                    measure.result.set_result(dict(self._rates(backend, measure)))
        except Exception:  # thread top: a node that goes on answering heartbeats must not be deaf
            log.exception("node %s failed", self.name)

    def _rates(self, backend: Backend, measure: _Measure) -> Iterator[tuple[str, DeviceRates]]:
        try:
            devices = backend.devices()
        except Exception as error:  # noqa: BLE001 - as below; and somebody waits for an answer
            log.warning("how fast the devices compute is not known: %s", error)
            return
        for device in devices:
            try:
                bench = Bench(backend, device, measure.model, measure.memory_bytes, self._system, measure.stop)
                yield device.id, decode_rate(bench) if measure.is_brief else device_rates(bench, len(devices))
            except Exception as error:  # noqa: BLE001 - the border to a backend: plans can be made without
                level = logging.INFO if measure.stop() else logging.WARNING
                log.log(level, "how fast %s computes is not known: %s", device.id, error)

    # ------------------------------------------------------------ loading

    def _load(self, backend: Backend, assignment: Assignment) -> None:
        epoch = assignment.epoch
        means = Means(backend, self._open_store, self._dial, self._system)
        try:
            with ExitStack() as exits:
                serving = open_serving(self.name, assignment, means, self._tell_loading(epoch), exits)
                serving.exits = exits.pop_all()
        except Exception as error:  # noqa: BLE001 - the border of a load: it fails, the node lives
            fault = self._load_error(error)
            if self._is_wanted(epoch):
                device = fault.device if isinstance(fault, DeviceMemoryError) else ""
                self._report(LoadFailed(epoch, fault, device, self._free_bytes(backend, device)))
            return
        self.meter.disk_s += serving.load_s
        self.meter.read_from(serving.store)
        self._carrier = Carrier(self.name, serving, self.meter, self._report, lambda: self._is_wanted(epoch))
        self._serving = serving
        self._report(Ready(epoch))

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

    def _tell_loading(self, epoch: Epoch) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if not self._is_wanted(epoch):
                raise ClusterError("the load was given up")
            self._report(Loading(epoch, done, total))

        return tell

    def _is_wanted(self, epoch: Epoch) -> bool:
        """False when something else was ordered meanwhile: what takes long need not go on."""
        return self._ordered == epoch and not self._stopping.is_set()

    def _give_up(self) -> None:
        serving, self._serving, self._carrier = self._serving, None, None
        if serving is not None:
            self.meter.read_from(None)
            try:
                serving.exits.close()
            except Exception:  # the border to a backend: the next load is not to fail for it
                log.exception("node %s could not give back all that it had loaded", self.name)


def _is_step(job: _Job) -> bool:
    return isinstance(job, _Launch) or (isinstance(job, _Arrived) and job.frame.error is None)


def _step_of(job: _Job) -> Step:
    if isinstance(job, _Launch):
        return job.planned.step
    return job.frame.step if isinstance(job, _Arrived) else Step(())


def _place(job: _Job) -> tuple[object, ...] | None:
    """Equal of what could be done together."""
    if isinstance(job, _Launch):
        return ("launch", job.epoch)
    return (id(job.serving), job.frame.visit) if isinstance(job, _Arrived) else None
