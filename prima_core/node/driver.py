"""The head's one loop: engine, plan and membership meet here, in one thread that owns all of their state.

Everything that happens (a request, a result, a node that came or went) is a message in one inbox, so there are no
locks and no state that two threads change. What others may read is an immutable `Status`, swapped as a whole.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from prima_core.engine.engine import Deliver, Engine
from prima_core.engine.request import Failed, Request
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import ClusterError, PrimaError
from prima_core.events import Event, NodeJoined, NodeLost, PlanMade
from prima_core.model.visible import visible
from prima_core.node.member import Member
from prima_core.node.running import Running
from prima_core.plan.plan import Plan
from prima_core.plan.problem import LinkFacts
from prima_core.plan.words import summary
from prima_core.ring.reports import Collected, LoadFailed, Loading, Ready, Report, Unreachable
from prima_core.ring.wire import Epoch

log = logging.getLogger(__name__)

POLL_S = 0.5
IDLE_S = 30.0
"""Nobody asks for so long: then a better plan is worth the time that it takes to load weights anew. After each plan
that was followed for its own sake twice as long: what comes and goes is not to load weights again and again."""
PROBE_AFTER_S = 5.0
"""When steps are in flight and none has come back for so long, an empty one is sent behind them: see `Engine.probe`."""


class State(StrEnum):
    WAITING = "waiting"  # no plan fits, or not enough nodes are there: `Status.reason` says which
    LOADING = "loading"
    SERVING = "serving"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Status:
    """What the driver is doing, for whoever asks from another thread."""

    state: State
    reason: str = ""
    plan: Plan | None = None
    members: tuple[Member, ...] = ()
    progress: Mapping[str, float] = field(default_factory=dict)  # loaded share of each node that still loads


class Nodes(Protocol):
    """How the driver reaches the nodes of a plan, its own worker among them."""

    def assign(self, epoch: Epoch, plan: Plan, addresses: Mapping[str, str]) -> None:
        """Tell every node of the plan to load its part, and the others to release what they have."""
        ...

    def launch(self, epoch: Epoch, planned: PlannedStep) -> None: ...


@dataclass(frozen=True, slots=True)
class Submit:
    number: int
    request: Request
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class Cancel:
    number: int


@dataclass(frozen=True, slots=True)
class Joined:
    member: Member


@dataclass(frozen=True, slots=True)
class Lost:
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A node, by name, tells how its load goes or what came out of a step."""

    name: str
    report: Report


@dataclass(frozen=True, slots=True)
class Relearned:
    """While it followed `plan` a node computed so many `times` as fast as that took it to; or a link has changed."""

    name: str
    times: float = 1.0
    link: LinkFacts | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    error: PrimaError


Message = Submit | Cancel | Joined | Lost | Reported | Relearned | Stop
Better = Callable[[Plan, tuple[Member, ...]], Plan | None]
Planner = Callable[[tuple[Member, ...]], Plan]


class Driver:
    """`wait_for`: how many nodes must be there before the first plan. `room_of` reads the engine's room off a plan.
    `better` has a plan that is worth changing to by what is known now, or none."""

    def __init__(
        self,
        engine: Engine,
        nodes: Nodes,
        planner: Planner,
        room_of: Callable[[Plan], Room],
        first_epoch: Epoch,
        wait_for: int = 1,
        emit: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
        better: Better = lambda plan, members: None,
    ) -> None:
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None ends the thread
        self.status = Status(State.WAITING, "starting")
        self.engine_facts = engine.facts()  # swapped as a whole after each message
        self._engine = engine
        self._nodes = nodes
        self._planner = planner
        self._room_of = room_of
        self._epoch = first_epoch
        self._wait_for = wait_for
        self._emit = emit
        self._clock = clock
        self._moved_s = clock()  # when a step was last launched or came back
        self._members: dict[str, Member] = {}
        self._unfit: dict[str, PrimaError] = {}  # members that could not load: left out until they join again
        self._short: dict[str, PrimaError] = {}  # members that had less memory than they said when they joined
        self._lost: dict[str, str] = {}  # why nodes are gone that were there since the last plan
        self._running: Running | None = None
        self._replan_when_idle = False
        self._better = better
        self._has_relearned = False
        self._busy_s = clock()  # when there was last something to do, or a better plan was looked for
        self._patience_s = IDLE_S
        self._thread = threading.Thread(target=self._main, name="prima-driver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self, error: PrimaError) -> None:
        """End all requests with `error` soon, and take no others. Safe in a signal handler."""
        self.inbox.put(Stop(error))

    def stop(self, error: PrimaError, timeout_s: float = 5.0) -> None:
        """As `ask_to_stop`, and end the thread. Idempotent."""
        self.ask_to_stop(error)
        self.inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # ------------------------------------------------------------ the loop

    def _main(self) -> None:
        while True:
            try:
                if self._turn():
                    return
            except Exception as error:  # thread top: nothing may hang on a dead driver
                log.exception("the driver failed")
                self._stop(ClusterError(f"the server failed: {type(error).__name__}: {error}", hint="restart it"))

    def _turn(self) -> bool:
        """Take a message, or notice that none came; True at the end."""
        with suppress(queue.Empty):
            message = self.inbox.get(timeout=POLL_S)
            if message is None:
                return True
            self.handle(message)
        self.tick()
        return False

    def handle(self, message: Message) -> None:
        """Take one message and launch what can be launched. After Stop requests are refused, and all else ignored."""
        if self.status.state is State.STOPPED and not isinstance(message, Submit):
            return
        match message:
            case Reported(name, report):
                self._take_report(name, report)
            case Submit():
                self._submit(message)
            case Cancel(number):
                self._engine.cancel(number)
            case Joined(member):
                self._join(member)
            case Lost(name, why):
                self._lose(name, why)
            case Relearned():
                self._relearn(message)
            case Stop(error):
                self._stop(error)
        self._pump()
        self.engine_facts = self._engine.facts()

    def tick(self) -> None:
        """Notice that a load does not go on, that nothing comes back or nobody asks; to be called now and then."""
        stalled = None if self._running is None else self._running.stalled(self._clock())
        if stalled is not None:
            self._refuse(*stalled)
        running = self._running
        if not self._engine.is_idle or running is None or running.pending:
            self._busy_s = self._clock()
        elif self._has_relearned and self._clock() - self._busy_s >= self._patience_s:
            self._reconsider(running)
        if running is None or not 0 < self._engine.n_in_flight < 2 * running.plan.credit:
            return
        if self._clock() - self._moved_s > PROBE_AFTER_S:
            self._launch(running, self._engine.probe())

    def _pump(self) -> None:
        if self._replan_when_idle and self._engine.is_idle and not self._is_loading:
            self._replan("")
        running = self._running
        if running is None or running.pending:
            return
        while self._engine.n_in_flight < running.plan.credit:
            planned = self._engine.next_step()
            if planned is None:
                return
            self._launch(running, planned)

    def _launch(self, running: Running, planned: PlannedStep) -> None:
        self._moved_s = self._clock()
        self._nodes.launch(running.epoch, planned)

    @property
    def _is_loading(self) -> bool:
        return self._running is not None and bool(self._running.pending)

    # ------------------------------------------------------------ messages

    def _submit(self, message: Submit) -> None:
        try:
            if self._running is None:
                raise ClusterError(self.status.reason, hint="try again when the cluster is ready, see /health")
            self._engine.submit(message.number, message.request, message.deliver)
        except PrimaError as error:
            message.deliver(Failed(error))

    def _take_report(self, name: str, report: Report) -> None:
        running = self._running
        if running is None or report.epoch != running.epoch:
            return
        match report:
            case Collected(_, result):
                self._moved_s = self._clock()
                self._engine.accept(result)
            case Loading(_, done, total):
                running.loads(name, min(1.0, done / max(1, total)), self._clock())
                self._tell()
            case Ready():
                running.is_ready(name)
                self._tell()
                if not running.pending:
                    self._emit(PlanMade(running.epoch.counter, running.plan))
            case LoadFailed(_, error, device, memory_bytes):
                taken = running.plan.bytes_on(name, device)
                if device and taken:  # in any case less than that next time, so that this comes to an end
                    self._shrink(name, error, device, min(memory_bytes, taken - 1))
                elif name != running.plan.head or name in running.pending:
                    self._refuse(name, error)
                # else the head's own weights could not be read in a step, whose requests hear of it: nobody could
                # take its place, and the next step tries again
            case Unreachable(_, node, error):
                # The head cannot be left out, nor a node to which this one has nothing to send: then it is the one that
                # complains.
                is_next = node != running.plan.head and node in running.plan.successors(name)
                self._refuse(node if is_next else name, error)

    def _refuse(self, name: str, error: PrimaError) -> None:
        log.warning("node %s cannot serve: %s", name, error)
        before = None if self._running is None else self._running.before
        if before is not None:
            log.warning("the plan that served before is followed again")
            self._begin(before.plan, f"node {name!r} cannot serve: {error}", before.members)
            return
        self._unfit[name] = error
        self._replan(f"node {name!r} cannot serve: {error}")

    def _shrink(self, name: str, error: PrimaError, device: str, memory_bytes: int) -> None:
        """Plan again with the memory that the device has."""
        log.warning("node %s: %s", name, error)
        self._members[name] = self._members[name].with_at_most(device, memory_bytes)
        self._short[name] = error
        self._replan(f"node {name!r}: {error}")

    def _join(self, member: Member) -> None:
        self._members[member.name] = member
        self._lost.pop(member.name, None)
        self._emit(NodeJoined(member.name, member.facts.room_bytes, tuple(device.id for device in member.devices)))
        if self._running is None:
            self._replan("")
        else:
            self._replan_when_idle = True
            self._tell()

    def _lose(self, name: str, why: str) -> None:
        if self._members.pop(name, None) is None:
            return
        self._unfit.pop(name, None)
        self._short.pop(name, None)
        self._emit(NodeLost(name, why))
        if self._running is not None and self._running.before is not None and name in self._running.before.plan.nodes:
            self._running.before = None
        if self._running is None or name in self._running.plan.nodes:
            self._lost[name] = why
            self._replan(f"node {name!r} was lost: {why}")
        else:
            self._tell()

    def _relearn(self, message: Relearned) -> None:
        """Plans and measurements are compared with what was known when the plan was made, so that the same news twice
        is no news."""
        before = dict(self._members)
        if message.link is not None:
            self._members = {name: member.with_link(message.link) for name, member in before.items()}
        running = self._running
        planned = None if running is None or running.plan is not message.plan else running.members.get(message.name)
        if planned is not None and message.name in before:
            devices = planned.computing(message.times).devices
            self._members[message.name] = replace(before[message.name], devices=devices)
        if self._members != before:
            self._has_relearned = True
            self._tell()

    def _stop(self, error: PrimaError) -> None:
        self._engine.stop(error)
        self._running = None
        self._tell(State.STOPPED, error.message)

    # ------------------------------------------------------------ plans

    @property
    def fit_members(self) -> tuple[Member, ...]:
        """Those that plans are made for. For the driver's thread."""
        return tuple(member for name, member in self._members.items() if name not in self._unfit)

    def _replan(self, why: str) -> None:
        """Make a plan for the members that are fit; `why` is told to the requests that end by it."""
        self._replan_when_idle = False
        members = self.fit_members
        if len(members) < self._wait_for:
            self._wait(f"waiting for nodes: {len(members)} of {self._wait_for} are here", why)
            return
        try:
            plan = self._planner(members)
        except PrimaError as error:  # also of a solver that is broken
            if self._running is None or why:
                self._wait(str(error), why)
            else:
                log.warning("the present plan stays: %s", error)
            return
        if self._running is not None and plan == self._running.plan and not why:
            return
        self._patience_s = IDLE_S
        self._begin(plan, why)

    def _reconsider(self, running: Running) -> None:
        """What was measured while serving may make another plan better."""
        self._has_relearned, self._busy_s = False, self._clock()
        try:
            plan = self._better(running.plan, self.fit_members)
        except PrimaError as error:  # also of a solver that is broken
            log.warning("the present plan stays: %s", error)
            return
        if plan is not None:
            log.warning("planned anew, as what was measured while serving makes another plan better")
            self._patience_s *= 2
            self._begin(plan, "").before = running

    def _begin(self, plan: Plan, why: str, members: Mapping[str, Member] | None = None) -> Running:
        """`members`: as it was planned with, if that was not now."""
        log.info("%s", visible(summary(plan)))
        self._wait_for = 1  # from now on the cluster goes on with those that are left
        self._epoch = self._epoch.next()
        self._lost = {}
        self._has_relearned = False
        self._engine.restart(self._room_of(plan), _ended(why))
        self._running = Running(self._epoch, plan, set(plan.nodes), members or dict(self._members), self._clock())
        addresses = {name: self._members[name].data_address for name in plan.nodes}
        self._tell()
        self._nodes.assign(self._epoch, plan, addresses)
        return self._running

    def _wait(self, reason: str, why: str) -> None:
        """No plan: running requests end, waiting ones wait, new ones are refused with the reason."""
        if self._running is not None:
            self._engine.restart(self._engine.room, _ended(why))
            self._running = None
        faults = [f"node {name!r} cannot serve: {error}" for name, error in self._unfit.items()]
        faults += [f"node {name!r}: {error}" for name, error in self._short.items()]
        faults += [f"node {name!r} was lost: {why}" for name, why in self._lost.items()]
        self._tell(State.WAITING, f"{reason} ({'; '.join(faults)})" if faults else reason)

    def _tell(self, state: State | None = None, reason: str = "") -> None:
        running = self._running
        if state is None:
            state = State.WAITING if running is None else State.LOADING if running.pending else State.SERVING
            reason = self.status.reason if running is None else ""
        self.status = Status(
            state,
            reason,
            running.plan if running else None,
            tuple(self._members.values()),
            dict(running.progress) if running else {},
        )


def _ended(why: str) -> ClusterError:
    reason = why or "the cluster was planned anew"
    return ClusterError(reason, hint="ask again: the server goes on with the nodes that are left")
