"""The head's side of the control plane: who is in the cluster, and who has gone.

One thread reads the control link, answers hellos, sends heartbeats and notices silence. It never waits for a worker:
one that cannot be reached must not make the others seem silent. What it learns goes to the driver's inbox; the
driver's orders go out through `send`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version

from prima_core.errors import ClusterError, FrameError, LinkError, LinkTimeout, PrimaError
from prima_core.interfaces import ReceiveLink, SendLink
from prima_core.plan.problem import DeviceFacts
from prima_core.plan.profile import Profile
from prima_core.ring import control
from prima_core.ring.control import Channel, FrameKind, Hello, Welcome
from prima_core.ring.times import NodeTimes

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
LOST_AFTER_S = 2.5
POLL_S = 0.1
SEND_TIMEOUT_S = 0.5  # of the driver's orders
MAX_AT_ONCE = 256
"""Frames that are read before heartbeats are sent and silence is noticed."""
MAX_PENDING = 64
"""Handshakes that may be open at a time: a node that says hello and never goes on is forgotten."""


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What a worker told about itself in its hello; `name` is the one that the head gave it."""

    name: str
    memory_bytes: int
    devices: tuple[DeviceFacts, ...]
    data_address: str
    profile: Profile = field(default_factory=Profile)


@dataclass(slots=True)
class _Peer:
    facts: PeerFacts
    hello: Hello
    answer: bytes
    link: SendLink
    channel: Channel
    last_seen_s: float
    last_sent_s: float
    answered: bool = False
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Listener:
    """Whom membership tells what it learns; called from its thread. `told` gets a worker's other messages, `timed` what
    it says about itself with a heartbeat."""

    joined: Callable[[PeerFacts], None]
    lost: Callable[[str, str], None]
    told: Callable[[str, control.Message], None]
    timed: Callable[[str, NodeTimes], None]


class Membership:
    """Owns the control link and every session. `own_name` is the head's node name, which no worker may get."""

    def __init__(
        self,
        own_name: str,
        node_id: str,
        link: ReceiveLink,
        dial: Callable[[str], SendLink],
        secret: bytes,
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own_name = own_name
        self._node_id = node_id
        self._link = link
        self._dial = dial
        self._secret = secret
        self._listener = listener
        self._clock = clock
        self._peers: dict[int, _Peer] = {}  # by session id
        self._lock = threading.Lock()  # guards `_peers`: the driver's thread looks names up
        self._telling = threading.RLock()  # that a node is lost is told before it is told that it has joined again
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prima-membership", daemon=True)

    @property
    def address(self) -> str:
        return self._link.address

    def start(self) -> None:
        self._thread.start()

    def send(self, name: str, message: control.Message) -> None:
        """Tell a worker something; one that cannot be told is lost. From any thread."""
        peer = self._by_name(name)
        if peer is None:
            return
        try:
            peer.channel.send(message, SEND_TIMEOUT_S)
        except LinkError as error:
            self._lose(peer, f"it could not be reached: {error.message}")

    def close(self, reason: str) -> None:
        """Say goodbye to every worker and end the thread. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for peer in self._all():
            self._try_to_send(peer, control.Bye.because(reason))
            self._forget(peer)
        self._link.close()

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                self.turn()
            except LinkError as error:
                log.error("the control link failed, no node can join or leave any more: %s", error)
                return

    def turn(self) -> None:
        """Read what has come (all of it: silence is judged behind), then send heartbeats and notice silence."""
        wait_s = POLL_S
        with suppress(LinkTimeout):
            for _ in range(MAX_AT_ONCE):
                frame, wait_s = self._link.receive(wait_s), 0.0
                try:
                    self._take(frame)
                except PrimaError as error:
                    log.warning("dropped a control frame: %s", error)
        self._beat()

    def _take(self, frame: memoryview) -> None:
        envelope = control.read_envelope(frame)
        if envelope.kind is FrameKind.HELLO:
            self._welcome(control.open_hello(frame, self._secret))
        elif envelope.kind is FrameKind.SEALED:
            with self._lock:
                peer = self._peers.get(envelope.session)
            if peer is not None:  # else: a session that was given up
                self._hear(peer, peer.channel.session.open(frame))
        else:
            raise FrameError("the head was sent an answer")

    def _hear(self, peer: _Peer, message: control.Message) -> None:
        peer.last_seen_s = self._clock()
        if not peer.joined:
            self._admit(peer)
        if isinstance(message, control.Bye):
            self._lose(peer, f"it left ({message.reason})" if message.reason else "it left")
        elif not isinstance(message, control.Heartbeat):
            self._listener.told(peer.facts.name, message)
        elif message.times is not None:
            self._listener.timed(peer.facts.name, message.times)

    def _admit(self, peer: _Peer) -> None:
        """The worker has proven that it holds the session's key; an older session of the same node ends here."""
        with self._telling:
            for other in self._all():
                if other is not peer and other.hello.node_id == peer.hello.node_id:
                    self._lose(other, "it joined again")
            peer.joined = True
            self._listener.joined(peer.facts)

    def _beat(self) -> None:
        now = self._clock()
        for peer in self._all():
            if now - peer.last_seen_s > LOST_AFTER_S:
                self._lose(peer, f"nothing was heard of it for {LOST_AFTER_S:g} s")
            elif not peer.answered:
                self._answer(peer)
            elif now - peer.last_sent_s > HEARTBEAT_S:
                peer.last_sent_s = now
                self._try_to_send(peer, control.Heartbeat())

    # ------------------------------------------------------------ handshake

    def _welcome(self, hello: Hello) -> None:
        again = next((peer for peer in self._all() if peer.hello == hello), None)
        if again is not None:
            again.answered = False
            return
        if sum(not peer.joined for peer in self._all()) >= MAX_PENDING:
            raise FrameError(f"more than {MAX_PENDING} nodes want to join at once")
        welcome = Welcome(self._node_id, control.new_nonce(), self._free_name(hello), version("prima-llm"))
        answer: control.Answer = welcome
        if hello.version != welcome.version:
            answer = control.Rejected(control.Fault.of(_other_version(hello, welcome)))
            log.warning("node %s was rejected: %s", hello.name, answer.fault.message)
        link = self._dial(hello.control_address)
        channel = Channel(link, control.head_session(hello, welcome, self._secret))
        now, frame = self._clock(), control.answer_frame(answer, hello, self._secret)
        with self._lock:  # a rejected one too: it never gets to know the key of the session, and is forgotten
            self._peers[channel.session.id] = _Peer(_facts(hello, welcome), hello, frame, link, channel, now, now)

    def _answer(self, peer: _Peer) -> None:
        """Try to; else again in the next turn: the link may not have found the worker yet."""
        try:
            peer.link.send([peer.answer], 0.0)
            peer.answered = True
        except LinkError as error:
            log.info("could not answer %s at %s yet: %s", peer.hello.name, peer.hello.control_address, error)

    def _free_name(self, hello: Hello) -> str:
        """The name that the worker wants, with a number behind it where another node has it."""
        taken = {peer.facts.name for peer in self._all() if peer.hello.node_id != hello.node_id} | {self._own_name}
        name, number = hello.name, 2
        while name in taken:
            name, number = f"{hello.name}-{number}", number + 1
        return name

    # ------------------------------------------------------------ peers

    def _all(self) -> tuple[_Peer, ...]:
        with self._lock:
            return tuple(self._peers.values())

    def _by_name(self, name: str) -> _Peer | None:
        return next((peer for peer in self._all() if peer.joined and peer.facts.name == name), None)

    def _try_to_send(self, peer: _Peer, message: control.Message) -> None:
        try:
            peer.channel.send(message, 0.0)
        except LinkError as error:
            log.info("could not reach %s: %s", peer.facts.name, error)

    def _lose(self, peer: _Peer, why: str) -> None:
        with self._telling:
            if self._forget(peer) and peer.joined:
                self._listener.lost(peer.facts.name, why)

    def _forget(self, peer: _Peer) -> bool:
        """Whether it was known till now: two threads may lose the same one."""
        with self._lock:
            known = self._peers.pop(peer.channel.session.id, None) is not None
        peer.channel.close()
        return known


def _facts(hello: Hello, welcome: Welcome) -> PeerFacts:
    devices = tuple(
        DeviceFacts(device.id, device.memory_bytes, device.shares_host, device.growth, copies=device.copies)
        for device in hello.devices
    )
    return PeerFacts(welcome.name, hello.memory_bytes, devices, hello.data_addresses[0], hello.profile)


def _other_version(hello: Hello, welcome: Welcome) -> ClusterError:
    return ClusterError(
        f"this node has prima {hello.version}, the head has {welcome.version}", hint="install the same version"
    )
