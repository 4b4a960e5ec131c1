"""The head finds out how fast its nodes' links are: as each node joins, one pair after the other, so that no
measurement disturbs another. What is found is not kept for another start: a laptop moves. So while nothing is served
one link after the other is looked at again.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from prima_core.errors import ConfigError, PrimaError
from prima_core.node.network import host_of, is_network
from prima_core.plan.problem import LinkFacts
from prima_core.ring import control
from prima_core.ring.probes import ID_BYTES, LinkFigures

log = logging.getLogger(__name__)

JOIN_S = 6.0
"""For all links of a node that joins; those that were not measured by then are not known."""
PROBE_S = 5.0
AGAIN_S = 5.0
"""Between two looks at links."""
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class End:
    """A node, where it takes activations, and on which machine that is ("": not known)."""

    name: str
    address: str
    machine: str = ""

    @property
    def place(self) -> tuple[str, str] | None:
        """Equal of nodes between which links are equal: of one machine, within it or at the same address of it. (Nodes
        of one machine in different network namespaces have different links.)"""
        with suppress(ConfigError):  # an address that can never work
            if self.machine:
                return self.machine, host_of(self.address) if is_network(self.address) else ""
        return None


class Prober(Protocol):
    """How the head itself measures and answers: `ring.probes.Probes`."""

    def answer(self, id: bytes, address: str) -> None: ...
    def measure(self, id: bytes, address: str, n_bytes: int, is_brief: bool, within_s: float) -> LinkFigures | None: ...


Send = Callable[[str, control.Message], None]
Ready = Callable[[tuple[LinkFacts, ...]], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """Whether links may be looked at again now, and who is told what was found: the link, seconds of a token's
    activations as measured at first, and now; it says whether to look once more."""

    is_idle: Callable[[], bool]
    looked: Callable[[LinkFacts, float, float], bool]


class LinkFinder:
    """Measures in a thread of its own, each pair of nodes both ways, but of each place only one pair, one way: the
    links inside are alike. `n_bytes`: of a token's activations."""

    def __init__(
        self, own: End, prober: Prober, send: Send, n_bytes: int, tell: Callable[[str], None], watch: Watch
    ) -> None:
        self._own, self._prober, self._send, self._n_bytes, self._tell = own, prober, send, n_bytes, tell
        self._watch = watch
        self._known: deque[LinkFacts] = deque()  # the thread's; what is looked at next first
        self._inside: dict[tuple[str, str], LinkFigures] = {}  # the thread's, by place
        self._lock = threading.Lock()  # guards the next two
        self._ends: dict[str, End] = {own.name: own}  # nodes that are known to the driver
        self._joining: dict[str, End] = {}
        self._asked: dict[bytes, Future[LinkFigures | None]] = {}
        self._jobs: queue.SimpleQueue[tuple[End, Ready] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prima-links", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._jobs.put(None)
        self._thread.join()

    def joined(self, end: End, ready: Ready) -> None:
        """`ready` is called with the links of the node that joins, to and from those before it, unless it is lost
        before that."""
        with self._lock:
            self._joining[end.name] = end
        self._jobs.put((end, ready))

    def lost(self, name: str) -> bool:
        """Whether anybody was told of the node."""
        with self._lock:
            self._joining.pop(name, None)
            return self._ends.pop(name, None) is not None

    def probed(self, message: control.Probed) -> None:
        """What a node has found; of a probe that nobody waits for any more nothing is known."""
        asked = self._asked.pop(message.id, None)
        if asked is not None:
            asked.set_result(LinkFigures(message.latency_s, message.bytes_s) if message.is_known else None)

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                job = self._jobs.get(timeout=AGAIN_S)
            except queue.Empty:
                self._look_again()
                continue
            if job is not None:
                self._take(*job)

    def _look_again(self) -> None:
        """At the next link whose nodes are still there."""
        while self._known:
            link = self._known[0]
            with self._lock:
                source, target = self._ends.get(link.source), self._ends.get(link.target)
            if source is not None and target is not None:
                break
            self._known.popleft()
        else:
            return
        if not self._watch.is_idle():
            return
        found = self._measured(source, target, time.monotonic() + PROBE_S, is_brief=True)
        if found is None or not self._watch.looked(link, link.time_s(self._n_bytes), found.latency_s):
            self._known.rotate(-1)

    def _take(self, end: End, ready: Ready) -> None:
        if not self._is_there(end):
            return
        self._known = deque(link for link in self._known if end.name not in (link.source, link.target))
        links = tuple(self._links(end))
        with self._lock:
            if self._joining.get(end.name) is not end or self._stopping.is_set():
                return
            del self._joining[end.name]
            self._ends[end.name] = end
            ready(links)  # under the lock: who is lost now was told of before

    def _is_there(self, end: End) -> bool:
        with self._lock:
            return end in (self._joining.get(end.name), self._ends.get(end.name))

    def _links(self, end: End) -> Iterator[LinkFacts]:
        """The head's first: they count most."""
        until_s = time.monotonic() + JOIN_S
        with self._lock:
            others = sorted((other for other in self._ends.values()), key=lambda other: other is not self._own)
        unknown: dict[str, None] = {}
        for source, target in (pair for other in others for pair in ((other, end), (end, other))):
            found = self._found(source, target, until_s)
            if self._stopping.is_set() or not self._is_there(end):
                return
            if found is not None:
                yield LinkFacts(source.name, target.name, found.latency_s, found.bytes_s)
            elif self._is_there(source) and self._is_there(target):
                unknown[target.name if source is end else source.name] = None
        if unknown:
            self._tell(f"the links between {end.name} and {', '.join(unknown)} could not all be measured")

    def _found(self, source: End, target: End, until_s: float) -> LinkFigures | None:
        """Measured, unless another link of the same place was."""
        inside = source.place if source.place == target.place else None
        if inside in self._inside:
            return self._inside[inside]
        found = self._measured(source, target, until_s) if time.monotonic() < until_s else None
        if found is not None:
            self._known.append(LinkFacts(source.name, target.name, found.latency_s, found.bytes_s))
            if inside is not None:
                self._inside[inside] = found
        return found

    def _measured(self, source: End, target: End, until_s: float, is_brief: bool = False) -> LinkFigures | None:
        try:
            return self._probe(source, target, until_s, is_brief)
        except PrimaError as error:  # an address that can never work, perhaps
            log.info("the link from %s to %s is not known: %s", source.name, target.name, error)
            return None

    def _probe(self, source: End, target: End, until_s: float, is_brief: bool) -> LinkFigures | None:
        id = secrets.token_bytes(ID_BYTES)
        if target is self._own:
            self._prober.answer(id, source.address)
        else:
            self._send(target.name, control.Echo(id, source.address))
        if source is self._own:
            within_s = min(until_s - time.monotonic(), PROBE_S)
            return self._prober.measure(id, target.address, self._n_bytes, is_brief, within_s)
        result = self._asked[id] = Future()
        self._send(source.name, control.Probe(id, target.address, self._n_bytes, is_brief))
        try:
            return self._awaited(result, (source, target), min(until_s, time.monotonic() + PROBE_S))
        finally:
            self._asked.pop(id, None)

    def _awaited(self, result: Future[LinkFigures | None], ends: tuple[End, End], until_s: float) -> LinkFigures | None:
        while all(map(self._is_there, ends)) and not self._stopping.is_set() and time.monotonic() < until_s:
            with suppress(NotYet):
                return result.result(_LOOK_S)
        return None
