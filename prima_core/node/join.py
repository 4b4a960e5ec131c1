"""A worker: it joins a head, takes its part of the model, and computes until it is told to stop.

The loop outlives the head: when the head goes away the worker gives its memory back and knocks again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

from prima_core.arch.families import open_model
from prima_core.errors import AuthError, FrameError, LinkError, LinkTimeout, ModelError, PrimaError
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink
from prima_core.memory.disks import machine_name
from prima_core.memory.system import host
from prima_core.model.fingerprint import ModelId, find_by_fingerprint
from prima_core.model.weights import Model
from prima_core.node.identity import own_id
from prima_core.node.lastwords import LastWords
from prima_core.node.measure import largest_model
from prima_core.node.network import with_port
from prima_core.node.node import DATA_LIMITS, Dialer, Node, NodeOptions
from prima_core.node.profiles import Profiles, cache_folder
from prima_core.node.profiling import Measurer
from prima_core.node.watch import CHECK_FILES_EVERY_S
from prima_core.plan.plan import plan_from_json
from prima_core.plan.profile import Profile
from prima_core.plugins import Registry
from prima_core.ring import control
from prima_core.ring.control import Assign, Channel, Hello, Welcome
from prima_core.ring.membership import HEARTBEAT_S
from prima_core.ring.probes import LinkFigures
from prima_core.ring.reports import Assignment, Collected, LoadFailed, Loading, Ready, Report, Unreachable
from prima_core.ring.sockets import abandon
from prima_core.ring.wire import Epoch

log = logging.getLogger(__name__)

CONTROL_LIMITS = Limits(max_message_bytes=control.MAX_CONTROL_BYTES, max_queued=64)
HELLO_EVERY_S = 1.0
TELL_AFTER_KNOCKS = 5
HEAD_LOST_AFTER_S = 5.0
POLL_S = 0.1
SEND_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """Where the head is (`head`, a full address), where this node listens for it (for frames: at another port of the
    same host), and where it finds model files. `measures`: it finds out how fast it is before it joins, or looks up
    what it has found out before; one that does not is taken to be as fast as a head on the same machine. `remembers`:
    it keeps an id, by which the head knows it again after a new start."""

    head: str
    listen: str
    name: str
    places: tuple[Path, ...]
    advertise: Callable[[str], str] = str
    node: NodeOptions = field(default_factory=NodeOptions)
    measures: bool = False
    remembers: bool = False


class WorkerNode:
    """`tell` is called with a line whenever something happens that its owner may want to know."""

    def __init__(
        self, options: JoinOptions, registry: Registry, secret: bytes, tell: Callable[[str], None] = log.info
    ) -> None:
        self._options = options
        self._secret = secret
        self._tell = tell
        self._id = secrets.token_hex(8)
        self._stopping = threading.Event()
        self._channel: Channel | None = None
        self._models: dict[str, Model] = {}
        self._in_use: tuple[Epoch, Model] | None = None  # set by the owner thread
        self._told_percent = -1
        self._last_words = LastWords(lambda error: self._send(control.Bye.because(str(error))), self._abandon)
        self._control_address = ""  # known when it listens
        self._profile = Profile()
        credentials = Credentials(secret)
        self._control = Dialer(registry, credentials, CONTROL_LIMITS)
        data = Dialer(registry, credentials, DATA_LIMITS)
        self._node = Node(options.name, registry, options.node, data, with_port(options.listen, 0), self._report)

    def stop(self) -> None:
        """End `run` soon; from any thread or signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Join and serve until `stop`. Raises PrimaError for what waiting cannot cure."""
        with ExitStack() as exits:
            if self._options.remembers:
                self._id = exits.enter_context(own_id(cache_folder(), self._options.name))
            exits.callback(self._close_models)  # last: the worker thread still has views into them
            self._last_words.start()
            exits.callback(self._last_words.close)
            self._node.start()
            exits.callback(self._node.close)
            self._tell(self._node.explanation)
            self._profile = self._measured()
            link = self._control.listen(self._options.listen)
            exits.callback(link.close)
            self._control_address = link.address
            while not self._stopping.is_set():
                self._join_once(link)

    def _measured(self) -> Profile:
        """By the largest model that is here: which one the head will serve is not known yet."""
        unknown = Profile(machine_name())
        path = largest_model(self._options.places) if self._options.measures else None
        if path is None:
            return unknown
        measurer = Measurer(Profiles(cache_folder()), host(), self._tell, self._stopping.is_set)
        try:
            with open_model(path) as model:
                return measurer.profile(self._node, model, self._options.node.memory)
        except (PrimaError, OSError) as error:
            log.info("this machine is not measured by %s: %s", path, error)
            return unknown

    # ------------------------------------------------------------ one session with a head

    def _join_once(self, link: ReceiveLink) -> None:
        """Knock until a head answers, then follow it until it goes away."""
        hello = self._hello(link)
        to_head = self._control.dial(self._options.head)
        try:
            welcome = self._knock(link, to_head, hello)
            if welcome is None:
                return
            self._tell(f"joined {self._options.head} as {welcome.name}")
            self._node.worker.name = welcome.name
            self._channel = Channel(to_head, control.worker_session(hello, welcome, self._secret))
            self._follow(link, self._channel)
        finally:
            self._channel = None
            self._release()
            to_head.close()

    def _hello(self, link: ReceiveLink) -> Hello:
        advertise = self._options.advertise
        return Hello(
            node_id=self._id,
            nonce=control.new_nonce(),
            name=self._options.name,
            version=version("prima-llm"),
            control_address=advertise(link.address),
            data_addresses=(advertise(self._node.data_address),),
            memory_bytes=self._options.node.memory,
            devices=tuple(map(control.DeviceInfo.of, self._node.devices)),
            profile=self._profile,
        )

    def _knock(self, link: ReceiveLink, to_head: SendLink, hello: Hello) -> Welcome | None:
        """Say hello again and again until the head answers; None when stopping. Raises the head's refusal."""
        frame, knocks = control.hello_frame(hello, self._secret), 0
        while not self._stopping.is_set():
            with suppress(LinkTimeout):
                to_head.send([frame], SEND_TIMEOUT_S)
            knocks += 1
            if knocks == TELL_AFTER_KNOCKS:
                self._tell(
                    f"no answer from {self._options.head} yet: is `prima serve --listen` running there,"
                    " and does it have the same token?"
                )
            welcome = self._await_answer(link, hello)
            if welcome is not None:
                return welcome
        return None

    def _await_answer(self, link: ReceiveLink, hello: Hello) -> Welcome | None:
        until = time.monotonic() + HELLO_EVERY_S
        while time.monotonic() < until and not self._stopping.is_set():
            try:
                return control.open_answer(link.receive(POLL_S), hello, self._secret)
            except LinkTimeout:
                continue
            except (FrameError, AuthError) as error:
                log.info("dropped a control frame: %s", error)  # of an older session, or a stranger's
        return None

    def _follow(self, link: ReceiveLink, channel: Channel) -> None:
        """Do what the head says until it says goodbye, falls silent, or missed something that it has to know."""
        heard = sent = checked = time.monotonic()
        self._send(self._heartbeat())
        while not self._stopping.is_set() and self._channel is channel:
            with suppress(LinkTimeout):
                message = self._open(channel, link.receive(POLL_S))
                heard = time.monotonic() if message is not None else heard
                if isinstance(message, control.Bye):
                    self._tell(f"the head left: {message.reason}")
                    return
                self._obey(message)
            now = time.monotonic()
            if now - heard > HEAD_LOST_AFTER_S:
                self._tell(f"nothing was heard of the head for {HEAD_LOST_AFTER_S:g} s")
                return
            if now - sent > HEARTBEAT_S:
                sent = now
                self._send(self._heartbeat())
            if now - checked > CHECK_FILES_EVERY_S:
                checked = now
                self._check_files()
        self._send(control.Bye.because("stopped by its owner"))

    def _heartbeat(self) -> control.Heartbeat:
        return control.Heartbeat(self._node.worker.meter.times())

    def _open(self, channel: Channel, frame: memoryview) -> control.Message | None:
        try:
            return channel.session.open(frame)
        except (FrameError, AuthError) as error:
            log.info("dropped a control frame: %s", error)
            return None

    def _obey(self, message: control.Message | None) -> None:
        try:
            self._do(message)
        except PrimaError as error:
            log.info("the head's order %s cannot be followed: %s", type(message).__name__, error)

    def _do(self, message: control.Message | None) -> None:
        if isinstance(message, Assign):
            try:
                self._node.worker.load(self._assignment(message))
            except PrimaError as error:
                self._refuse(message.epoch, error)
        elif isinstance(message, control.Release):
            self._release()
        elif isinstance(message, control.Probe):
            tell = partial(self._tell_probed, message.id)
            self._node.probes.ask(message.id, message.address, message.n_bytes, tell, message.is_brief)
        elif isinstance(message, control.Echo):
            self._node.probes.answer(message.id, message.address)

    def _tell_probed(self, id: bytes, found: LinkFigures | None) -> None:
        """From the probes' thread."""
        known = () if found is None else (found.latency_s, found.bytes_s)
        self._send(control.Probed(id, found is not None, *known))

    def _check_files(self) -> None:
        """Take part no longer when the files that are in use have changed."""
        if self._in_use is None:
            return
        epoch, model = self._in_use
        try:
            model.check_unchanged()
        except ModelError as error:
            self._release()
            self._refuse(epoch, error)

    def _refuse(self, epoch: Epoch, error: PrimaError) -> None:
        self._tell(f"cannot take part: {error}")
        self._send(control.Refused(epoch, control.Fault.of(error)))

    def _release(self) -> None:
        self._in_use = None
        self._node.worker.unload()

    # ------------------------------------------------------------ assignments

    def _assignment(self, assign: Assign) -> Assignment:
        plan = plan_from_json(assign.plan)
        return Assignment(assign.epoch, plan, lambda: self._find_model(assign), assign.wire, assign.addresses)

    def _find_model(self, assign: Assign) -> Model:
        """Called in the owner thread."""
        model = self._model(assign.model)
        self._in_use = assign.epoch, model
        return model

    def _model(self, wanted: control.ModelId) -> Model:
        """The model with this fingerprint, from this node's own places; never from a path that the head names."""
        model = self._models.get(wanted.fingerprint)
        if model is not None:
            model.check_unchanged()
            return model
        id_ = ModelId(wanted.fingerprint, wanted.size_bytes, wanted.name)
        path = find_by_fingerprint(id_, self._options.places)
        if path is None:
            places = ", ".join(map(str, self._options.places)) or "nowhere"
            raise ModelError(
                f"model {wanted.name!r} ({wanted.size_bytes} bytes) was not found, looked in: {places}",
                hint="copy the head's file here and name it with --model or its folder with --models",
            )
        self._tell(f"using {path}")
        model = self._models[wanted.fingerprint] = open_model(path)
        self._last_words.watch(model)
        return model

    def _abandon(self) -> None:
        for address in (self._control_address, self._node.data_address):
            abandon(address)

    def _close_models(self) -> None:
        for model in self._models.values():
            model.close()

    def _report(self, report: Report) -> None:
        """From the owner thread: pass on to the head how the load goes."""
        match report:
            case Loading(epoch, done, total):
                self._send_progress(epoch, done, total)
            case Ready(epoch):
                self._tell("ready")
                self._send(control.Ready(epoch))
            case LoadFailed(epoch, error, device, memory_bytes):
                self._tell(f"cannot take part: {error}")
                self._send(control.Refused(epoch, control.Fault.of(error), device, memory_bytes))
            case Unreachable(epoch, node, error):
                self._send(control.Unreachable(epoch, node, control.Fault.of(error)))
            case Collected():
                log.error("a worker computed the output part")  # plans run it on the head

    def _send_progress(self, epoch: Epoch, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if percent != self._told_percent:  # at most a hundred messages a load
            self._told_percent = percent
            self._send(control.Progress(epoch, done, total))

    def _send(self, message: control.Message) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(message, SEND_TIMEOUT_S)
        except LinkError as error:
            log.info("could not reach the head: %s", error)
            if not isinstance(message, (control.Heartbeat, control.Progress)):
                self._channel = None  # it would wait for ever: join anew
