"""The head: it owns the model's text side and the driver, lets nodes join, and is itself the ring's first node."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Self

from prima_core.engine.engine import MAX_WAITING, Deliver, Engine
from prima_core.engine.facts import EngineFacts
from prima_core.engine.request import Request, Sampling
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import ClusterError, ModelError
from prima_core.events import RequestDone
from prima_core.interfaces import Credentials, Goal, KvType
from prima_core.memory.disks import machine_name
from prima_core.memory.system import host
from prima_core.model.visible import visible
from prima_core.model.vocabulary import DEFAULT_TEMPLATE
from prima_core.model.weights import Model
from prima_core.node.coordinate import Planning, model_facts, room_of
from prima_core.node.done import DoneTeller
from prima_core.node.drift import DriftWatch
from prima_core.node.driver import Cancel, Driver, Joined, Lost, Reported, State, Status, Submit
from prima_core.node.explainer import Explainer
from prima_core.node.join import CONTROL_LIMITS
from prima_core.node.lastwords import LastWords
from prima_core.node.links import End, LinkFinder, Watch
from prima_core.node.local import LocalNode, LocalOptions, close_all, start_local
from prima_core.node.network import advertised, with_port
from prima_core.node.node import DATA_LIMITS, Dialer, Node, NodeOptions, longest_chunk
from prima_core.node.peers import member_of, report_of
from prima_core.node.profiles import Profiles, cache_folder
from prima_core.node.profiling import Measurer
from prima_core.node.text import ModelText
from prima_core.node.view import RequestTotals, ServerView, link_views, node_view, token_s
from prima_core.node.watch import FileWatch
from prima_core.plan.plan import Plan, plan_to_json
from prima_core.plan.problem import PROMPT_TOKENS, DeviceFacts, LinkFacts
from prima_core.plan.profile import Profile
from prima_core.plan.words import summary
from prima_core.plugins import Registry
from prima_core.ring import control
from prima_core.ring.gather import row_bytes
from prima_core.ring.membership import Listener, Membership, PeerFacts
from prima_core.ring.reports import Assignment, Report
from prima_core.ring.sockets import abandon
from prima_core.ring.times import NodeTimes
from prima_core.ring.wire import Epoch, WirePolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """`listen`: where nodes join; None: none can. `wait`: nodes before the first plan, with this one.
    `rounds`: visits of every node in a pass; 0: the solver's choice. `goal` and `n_prompt`: as in a `Problem`.

    `chat_template`: the name of one of the model file's."""

    node: NodeOptions = field(default_factory=NodeOptions)
    name: str = "head"
    listen: str | None = None
    advertise: str | None = None
    n_local: int = 0
    wait: int = 1
    solver: str = "halda"
    goal: Goal = Goal.LATENCY
    n_prompt: int = PROMPT_TOKENS
    plan: Plan | None = None
    rounds: int = 0
    context: int | None = None
    context_shift: bool = False
    kv_type: KvType | None = None
    parallel: int = 4
    queue: int = MAX_WAITING
    chunk: int | None = None
    wire: WirePolicy = WirePolicy.AUTO
    sampling: Sampling = field(default_factory=Sampling)
    chat_template: str = DEFAULT_TEMPLATE
    log_level: str = "warning"


class Head(ModelText):
    """Open it with `start`, use it from any thread, end it with `close` (or `with`)."""

    def __init__(
        self,
        model: Model,
        options: HeadOptions,
        registry: Registry,
        secret: bytes,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        super().__init__(model, options.chat_template, options.context_shift)
        self.model_name = model.name
        self.model_file = visible(model.path.name)
        self.created = int(time.time())
        self.sampling = options.sampling
        self._facts = model_facts(model, options.context, options.kv_type, options.plan)
        self.context_length = self._facts.context_length
        if options.context is not None and options.context > self.context_length:
            most = self.context_length
            tell(f"the model's context has {most} tokens, -c {options.context} asks for more: {most} are served")
        self._options = options
        self._registry = registry
        self._secret = secret
        self._tell = tell
        self._numbers = itertools.count(1)
        self._exits = ExitStack()
        self._membership: Membership | None = None
        credentials = Credentials(secret)
        self._data = Dialer(registry, credentials, DATA_LIMITS)
        self._control = Dialer(registry, credentials, CONTROL_LIMITS)
        self._local: Sequence[LocalNode] = ()
        self._profile = Profile()
        self._times: dict[str, NodeTimes] = {}  # what each worker told last; the membership's thread writes
        self._drift = DriftWatch(tell, lambda news: self.driver.inbox.put(news))
        self._links: LinkFinder | None = None
        self._token_s = 0.0  # of the last request that tells; the driver's thread writes
        self.totals = RequestTotals()  # swapped as a whole by the driver's thread
        data_address = "inproc://" if options.listen is None else with_port(options.listen, 0)
        self.node = Node(options.name, registry, options.node, self._data, data_address, self._report)
        planning = self._planning()
        self.explainer = Explainer(planning.explained)
        self.driver = self._make_driver(planning)

    def _planning(self) -> Planning:
        options = self._options
        return Planning(
            self._facts,
            options.name,
            options.parallel,
            self._registry.solver(options.solver).solve,
            options.plan,
            options.rounds,
            options.goal,
            options.n_prompt,
            options.chunk or 0,
        )

    def _make_driver(self, planning: Planning) -> Driver:
        options = self._options
        longest, most_logits = longest_chunk(self.model.spec.d_model), longest_chunk(self.model.spec.vocab_size)
        room = Room(0, 1, 0)  # nothing, until there is a plan
        engine = Engine(self.tokenizer, self.context_length, room, options.context_shift, options.queue)
        return Driver(
            engine,
            self,
            planning,
            lambda plan: room_of(plan, options.chunk, longest, row_bytes(self.model.spec), most_logits),
            Epoch.first(),
            wait_for=max(options.wait, 1 + options.n_local),
            emit=self._registry.emit,
            better=planning.better,
        )

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Start to serve; `driver.status` tells how far it is. Raises PrimaError for a wrong option."""
        with ExitStack() as exits:
            exits.callback(self.close_text)
            last_words = LastWords(self._on_files_changed, self._abandon)
            last_words.start()
            exits.callback(last_words.close)
            last_words.watch(self.model)
            self.node.start()
            exits.callback(self.node.close)
            self.explainer.start()
            exits.callback(self.explainer.close)
            self.driver.start()
            exits.callback(self.driver.stop, _stopping())
            watch = FileWatch(self.model, self._on_files_changed)
            watch.start()
            exits.callback(watch.close)
            self._join_itself()
            if self._options.listen is not None:
                self._open_membership(self._options.listen, exits)
            self._exits = exits.pop_all()

    def _join_itself(self) -> None:
        devices = tuple(DeviceFacts.of(device) for device in self.node.devices)
        address = advertised(self.node.data_address, self._options.advertise)
        memory = self._options.node.memory
        self._profile = self._measured(memory)
        self.driver.inbox.put(Joined(member_of(PeerFacts(self._options.name, memory, devices, address, self._profile))))

    def _measured(self, memory_bytes: int) -> Profile:
        """Plans of a model that fits here need to know no rates, unless the solver says so."""
        solver = self._registry.solver(self._options.solver)
        if self.model.file.size <= memory_bytes and not (solver.needs_rates and self._options.listen is not None):
            return Profile(machine_name())
        return Measurer(Profiles(cache_folder()), host(), self._tell).profile(self.node, self.model, memory_bytes)

    def _open_membership(self, address: str, exits: ExitStack) -> None:
        listener = Listener(self._on_joined, self._on_lost, self._on_told, self._on_timed)
        link = self._control.listen(address)
        node_id = secrets.token_hex(8)
        membership = Membership(self._options.name, node_id, link, self._control.dial, self._secret, listener)
        self._membership = membership
        own = End(self._options.name, advertised(self.node.data_address, self._options.advertise), machine_name())
        watch = Watch(self._is_idle, self._drift.see_link)
        links = LinkFinder(own, self.node.probes, membership.send, self._facts.activation_bytes, self._tell, watch)
        self._links = links
        links.start()
        exits.callback(links.close)
        exits.callback(self.node.probes.close)  # before: its thread may be measuring
        membership.start()
        exits.callback(membership.close, "the server is stopping")
        local = LocalOptions(
            self._options.n_local,
            membership.address,
            self._options.name,
            self.model.path,
            self._options.node,
            self._options.log_level,
        )
        self._local = start_local(local, self._registry, self._secret, self._tell)
        exits.callback(close_all, self._local)
        exits.callback(self.stop_requests)  # first, so that nodes that leave do not look lost

    @property
    def join_address(self) -> str | None:
        """What a worker dials to join, or None."""
        membership = self._membership
        return None if membership is None else advertised(membership.address, self._options.advertise)

    def stop_requests(self) -> None:
        """End every request now, e.g. because the user wants to leave; nothing new is taken."""
        self.driver.ask_to_stop(_stopping())

    def close(self) -> None:
        """End all threads and child processes. Idempotent. The model stays open: it is the caller's."""
        self._exits.close()

    def _abandon(self) -> None:
        """What is left behind where the process ends without `close`."""
        for address in (self.node.data_address, "" if self._membership is None else self._membership.address):
            abandon(address)
        for node in self._local:
            node.abandon()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ what clients use (any thread)

    def engine_facts(self) -> EngineFacts:
        """What the engine is doing now."""
        return self.driver.engine_facts

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request; events come to `deliver` on the driver's thread, Finished or Failed last."""
        number = next(self._numbers)
        done = DoneTeller(f"{number}", len(request.prompt), self._on_done, deliver)
        self.driver.inbox.put(Submit(number, request, done))
        return number

    def cancel(self, number: int) -> None:
        """Stop a request. Idempotent."""
        self.driver.inbox.put(Cancel(number))

    def health(self) -> tuple[bool, dict[str, object]]:
        """Whether requests are served now, and what to tell a monitor."""
        status, engine = self.driver.status, self.driver.engine_facts
        facts: dict[str, object] = {"status": "ok" if status.state is State.SERVING else status.state.value}
        if status.reason:
            facts["reason"] = status.reason
        if status.progress:
            facts["progress"] = {name: round(share, 3) for name, share in status.progress.items()}
        facts["nodes"] = [member.name for member in status.members]
        facts["running"], facts["waiting"] = len(engine.running), engine.n_waiting
        return status.state is State.SERVING, facts

    def view(self) -> ServerView:
        """The cluster as it is now, for whoever looks."""
        status, engine, own = self.driver.status, self.driver.engine_facts, self._options.name
        times = {**self._times, own: self.node.worker.meter.times()}
        members = sorted(status.members, key=lambda member: (member.name != own, member.name))
        return ServerView(
            self.model_name,
            version("prima-llm"),
            status.state,
            status.reason,
            self.context_length,
            len(engine.running),
            engine.n_waiting,
            engine.kv_running,
            engine.kv_tokens,
            tuple(
                node_view(member, own, status, times.get(member.name, NodeTimes()), self._drift.off(member.name))
                for member in members
            ),
            None if status.plan is None else status.plan.forecast,
            self._token_s,
            "" if status.plan is None else summary(self.explainer.explained(status.plan)),
            link_views(status.members),
        )

    def wait_until_serving(self, tell: Callable[[Status], None] = lambda status: None, poll_s: float = 0.02) -> None:
        """Block until requests are served; `tell` gets the status again and again.

        While nodes are missing this waits for them; raises ClusterError when all are there and no plan fits, and when
        one that was started on this machine has ended.
        """
        while True:
            status = self.driver.status
            tell(status)
            if status.state is State.SERVING:
                return
            complete = len(status.members) >= max(self._options.wait, 1 + self._options.n_local)
            if status.state is State.STOPPED or (status.state is State.WAITING and complete):
                raise ClusterError(status.reason)
            for fault in filter(None, (node.fault for node in self._local)):
                raise ClusterError(fault)
            threading.Event().wait(poll_s)

    # ------------------------------------------------------------ what the driver uses (its thread)

    def assign(self, epoch: Epoch, plan: Plan, addresses: Mapping[str, str]) -> None:
        own = self._options.name
        self.explainer.ask(plan, self.driver.fit_members)
        assignment = Assignment(epoch, plan, lambda: self.model, self._options.wire, addresses)
        if self._membership is not None:
            model = control.ModelId(self.model.fingerprint, self.model.file.size, self.model_name)
            message = control.Assign(epoch, plan_to_json(plan), model, self._options.wire, dict(addresses))
            for member in self.driver.status.members:
                if member.name != own:
                    self._membership.send(member.name, message if member.name in plan.nodes else control.Release())
        self.node.worker.load(assignment)

    def launch(self, epoch: Epoch, planned: PlannedStep) -> None:
        self.node.worker.launch(epoch, planned)

    # ------------------------------------------------------------ what happens elsewhere, put into the driver's inbox

    def _report(self, report: Report) -> None:
        self.driver.inbox.put(Reported(self._options.name, report))

    def _on_files_changed(self, error: ModelError) -> None:
        """The text side of the model is open in this process: nothing but a new start makes it good again."""
        self._tell(f"nothing is served any more: {error}")
        self.driver.ask_to_stop(ClusterError(f"{error.message}: the server has to be started again"))

    def _on_joined(self, facts: PeerFacts) -> None:
        self._tell(f"node {facts.name} joined")
        is_same = facts.profile.machine == self._profile.machine and not facts.profile.devices
        known = replace(facts, profile=self._profile) if is_same else facts

        def ready(links: tuple[LinkFacts, ...] = ()) -> None:
            self.driver.inbox.put(Joined(member_of(known, links)))

        if self._links is None:
            ready()
        else:
            self._links.joined(End(facts.name, facts.data_address, facts.profile.machine), ready)

    def _on_lost(self, name: str, why: str) -> None:
        if self.driver.status.state is not State.STOPPED:  # else it is our own children leaving
            self._tell(f"node {name} was lost: {why}")
        self._times.pop(name, None)
        self._drift.lost(name)
        if self._links is None or self._links.lost(name):
            self.driver.inbox.put(Lost(name, why))

    def _on_timed(self, name: str, times: NodeTimes) -> None:
        self._times[name] = times
        self._look(name, times)
        self._look(self._options.name, self.node.worker.meter.times())

    def _is_idle(self) -> bool:
        return self.driver.status.state is State.SERVING and not self.driver.engine_facts.running

    def _look(self, name: str, times: NodeTimes) -> None:
        self._drift.see(name, times, self.driver.status, self.driver.engine_facts)

    def _on_done(self, done: RequestDone) -> None:
        self.totals = self.totals.plus(done)
        self._token_s = token_s(done) or self._token_s
        status = self.driver.status
        is_measured = all(member.is_measured for member in status.members)
        forecast = status.plan.forecast if status.plan is not None and is_measured else None
        self._drift.answered(done, forecast, self.driver.engine_facts)
        self._look(self._options.name, self.node.worker.meter.times())
        self._registry.emit(done)

    def _on_told(self, name: str, message: control.Message) -> None:
        if isinstance(message, control.Probed) and self._links is not None:
            self._links.probed(message)
            return
        report = report_of(message)
        if report is None:
            log.warning("node %s sent %s, which is the head's to say", name, type(message).__name__)
        else:
            self.driver.inbox.put(Reported(name, report))


def _stopping() -> ClusterError:
    return ClusterError("the server is stopping")
