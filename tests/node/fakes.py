"""A driver with nodes that only take notes: tests play their part, message by message, in one thread."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from prima_core.engine.engine import Engine, StepResult
from prima_core.engine.request import Event, Failed, Finished, Piece, Request, Sampled
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import ClusterError, DeviceMemoryError, PlanError, PrimaError
from prima_core.events import Event as ClusterEvent
from prima_core.node.driver import Cancel, Driver, Joined, Lost, Relearned, Reported, State, Stop, Submit
from prima_core.node.member import Member
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.plan.problem import DeviceFacts
from prima_core.ring.reports import Collected, LoadFailed, Loading, Ready, Report
from prima_core.ring.wire import Epoch
from tests.engine.fakes import letters, tokenizer

FIRST = Epoch(run_id=7, counter=1)
LAYER_BYTES = 100
ROOM = Room(kv_tokens=100, chunk_tokens=4, max_sequences=8)


@dataclass
class FakeNodes:
    assigned: list[tuple[Epoch, Plan, Mapping[str, str]]] = field(default_factory=list)
    launched: list[tuple[Epoch, PlannedStep]] = field(default_factory=list)

    def assign(self, epoch: Epoch, plan: Plan, addresses: Mapping[str, str]) -> None:
        self.assigned.append((epoch, plan, addresses))

    def launch(self, epoch: Epoch, planned: PlannedStep) -> None:
        self.launched.append((epoch, planned))


def plan_for(names: list[str], in_flight: int = 0) -> Plan:
    """A layer for each node, in this order."""
    visits = tuple(Visit(name, layer, layer + 1) for layer, name in enumerate(names))
    needs = tuple(Residency(name, "numpy:cpu", LAYER_BYTES, 0) for name in names)
    return Plan(len(names), names[0], visits, needs, kv_tokens=ROOM.kv_tokens, in_flight=in_flight)


class Rig:
    """`needs` nodes must be there for a plan; `wait_for` before the first one."""

    def __init__(self, wait_for: int = 1, needs: int = 1, in_flight: int = 0, max_waiting: int = 100) -> None:
        self.nodes = FakeNodes()
        self.emitted: list[ClusterEvent] = []
        self.events: dict[int, list[Event]] = {}
        self.needs = needs
        self.in_flight = in_flight
        self.broken_planner: PrimaError | None = None
        self.room = ROOM
        self.now_s = 0.0
        self.better_plan: Plan | None = None
        self.asked_for_better: list[tuple[Plan, tuple[Member, ...]]] = []
        self.driver = Driver(
            Engine(tokenizer(), 1000, Room(0, 4, 0), max_waiting=max_waiting),
            self.nodes,
            self.plan,
            lambda plan: self.room,
            FIRST,
            wait_for,
            self.emitted.append,
            lambda: self.now_s,
            self.better,
        )

    def plan(self, members: tuple[Member, ...]) -> Plan:
        if self.broken_planner is not None:
            raise self.broken_planner
        names = [member.name for member in members if member.devices[0].memory_bytes >= LAYER_BYTES]
        if len(names) < self.needs:
            raise PlanError(f"{len(names)} nodes have not memory enough", hint="add a node")
        return plan_for(names, self.in_flight)

    def better(self, plan: Plan, members: tuple[Member, ...]) -> Plan | None:
        if self.broken_planner is not None:
            raise self.broken_planner
        self.asked_for_better.append((plan, members))
        return self.better_plan

    # ------------------------------------------------------------ what nodes do

    def join(self, *names: str) -> None:
        for name in names:
            cpu = DeviceFacts("numpy:cpu", 1000, decode_bytes_s=1e9)
            self.driver.handle(Joined(Member(name, 1000, (cpu,), f"inproc://{name}")))

    def relearn(self, name: str, times: float) -> None:
        self.driver.handle(Relearned(name, times, plan=self.driver.status.plan))

    def passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.driver.tick()

    def lose(self, name: str, why: str = "nothing was heard of it") -> None:
        self.driver.handle(Lost(name, why))

    def report(self, name: str, report: Report) -> None:
        self.driver.handle(Reported(name, report))

    def ready(self, *names: str) -> None:
        for name in names or self.visited():
            self.report(name, Ready(self.epoch))

    def progress(self, name: str, done: int, total: int) -> None:
        self.report(name, Loading(self.epoch, done, total))

    def refuse(self, name: str, why: str = "the model was not found") -> None:
        self.report(name, LoadFailed(self.epoch, ClusterError(why)))

    def run_short(self, name: str, memory_bytes: int, device: str = "numpy:cpu") -> None:
        error = DeviceMemoryError("0 of the layers would fit")
        self.report(name, LoadFailed(self.epoch, error, device, memory_bytes))

    def collect(self, epoch: Epoch, planned: PlannedStep, error: PrimaError | None = None) -> None:
        tokens = () if error else tuple((want.sequence, Sampled(letters(0, want.index))) for want in planned.wanted)
        self.report("head", Collected(epoch, StepResult(planned.number, tokens, error)))

    def collect_all(self) -> None:
        """Answer steps, in order, until none is launched any more."""
        while self.nodes.launched:
            self.collect(*self.nodes.launched.pop(0))

    # ------------------------------------------------------------ what clients do

    def submit(self, number: int, request: Request) -> None:
        self.driver.handle(Submit(number, request, self.events.setdefault(number, []).append))

    def cancel(self, number: int) -> None:
        self.driver.handle(Cancel(number))

    def stop(self, why: str = "the server is stopping") -> None:
        self.driver.handle(Stop(ClusterError(why)))

    # ------------------------------------------------------------ what can be seen

    @property
    def epoch(self) -> Epoch:
        return self.nodes.assigned[-1][0]

    @property
    def plan_now(self) -> Plan:
        return self.nodes.assigned[-1][1]

    def visited(self) -> tuple[str, ...]:
        """The nodes of the present plan."""
        return self.plan_now.nodes

    def state(self) -> State:
        return self.driver.status.state

    def text(self, number: int) -> str:
        return "".join(event.text for event in self.events[number] if isinstance(event, (Piece, Finished)))

    def failed(self, number: int) -> PrimaError:
        last = self.events[number][-1]
        assert isinstance(last, Failed)
        return last.error


class VirtualRing(Rig):
    """Stages in a row that take a time of 1 for each step, whatever is in it, on a clock that the test turns."""

    def __init__(self, n_stages: int, in_flight: int = 0) -> None:
        super().__init__(in_flight=in_flight, wait_for=n_stages)
        self._stage_free_s = [0.0] * n_stages
        self._through: list[tuple[float, int, Epoch, PlannedStep]] = []
        self.join("head", *(f"node-{index}" for index in range(1, n_stages)))
        self.ready()

    def first_token_s(self, number: int, request: Request) -> float:
        """Submit it now; how long till its first token."""
        began_s = self.now_s
        self.submit(number, request)
        while not any(isinstance(event, Piece) for event in self.events[number]):
            self.turn()
        return self.now_s - began_s

    def turn(self) -> None:
        """Let the stages work until the next step is through."""
        for epoch, planned in self.nodes.launched:
            heapq.heappush(self._through, (self._pass(), planned.number, epoch, planned))
        self.nodes.launched.clear()
        self.now_s, _, epoch, planned = heapq.heappop(self._through)
        self.collect(epoch, planned)

    def _pass(self) -> float:
        """When a step that starts now is through: each stage takes one at a time."""
        at_s = self.now_s
        for stage, free_s in enumerate(self._stage_free_s):
            at_s = max(at_s, free_s) + 1
            self._stage_free_s[stage] = at_s
        return at_s
