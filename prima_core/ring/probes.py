"""How long activations take from node to node: frames of their size over the real transport, between data links.

A node that measures sends pings, and the node at the other end answers each with a short echo, as long as both were
told so by the head: whoever does not know the probe's random id gets no answer. None of this is a frame of a ring.

    40 bytes            header (`_HEADER`): magic, version, kind, id of the probe, number, zeros
    zeros               of a ping, up to the size that is measured
"""

from __future__ import annotations

import logging
import math
import queue
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import IntEnum
from statistics import median

from prima_core.errors import LinkClosed, LinkError, LinkTimeout, PrimaError
from prima_core.interfaces import Buffer, SendLink

log = logging.getLogger(__name__)

ID_BYTES = 16
MAX_PING_BYTES = 1 << 20
"""Of the pings that the rate is measured with; activations of prompts are about as large."""
MAX_PROBES = 256
"""That a node answers, or has to measure, at a time."""
MAX_PINGS = 256
ANSWER_S = 10.0
"""So long after it was asked to a node answers pings."""
ASKED_S = 5.0
"""Who asked a node to measure waits no longer."""
CONNECT_S = 2.0
KNOCK_S = 0.05
MEASURE_S = 0.6
"""Afterwards no further ping is sent; one of each size is in any case."""
LOST_AFTER_S = 1.0
RUNS, LARGE_RUNS = 9, 3

_LEAST_S = 1e-6
_VERSION = 1
_MAGIC = b"PRMP"
_HEADER = struct.Struct("<4sBB2x16sI12x")


class _Kind(IntEnum):
    PING = 1
    ECHO = 2
    END = 3


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """As in `LinkFacts`: `latency_s` of the activations of a token beyond their bytes at `bytes_s`; 0: with them."""

    latency_s: float
    bytes_s: float = 0.0


@dataclass(slots=True)
class _Answering:
    link: SendLink
    until_s: float
    n_left: int = MAX_PINGS


@dataclass(frozen=True, slots=True)
class _Job:
    id: bytes
    address: str
    n_bytes: int
    is_brief: bool
    tell: Callable[[LinkFigures | None], None]
    until_s: float


def is_probe(data: memoryview) -> bool:
    return data.nbytes >= _HEADER.size and data[: len(_MAGIC)] == _MAGIC


class Probes:
    """Of one node. `ask` has a thread of its own, from the first call on."""

    def __init__(self, dial: Callable[[str], SendLink]) -> None:
        self._dial = dial
        self._lock = threading.Lock()  # guards the next two
        self._answering: dict[bytes, _Answering] = {}
        self._awaited: dict[bytes, queue.SimpleQueue[int]] = {}
        self._jobs: queue.Queue[_Job] = queue.Queue(MAX_PROBES)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Who measures gives up. Idempotent."""
        self._stopping.set()
        with self._lock:
            for awaited in self._awaited.values():
                awaited.put(0)  # wakes it
        if self._thread is not None:
            self._thread.join()
        self._forget_answers(all_of_them=True)

    # ------------------------------------------------------------ the node that answers

    def answer(self, id: bytes, address: str) -> None:
        """Echo the pings of this probe to an address, for a while. Raises PrimaError for one that can never work."""
        self._forget_answers()
        with self._lock:
            if len(self._answering) >= MAX_PROBES or id in self._answering or self._stopping.is_set():
                return
            self._answering[id] = _Answering(self._dial(address), time.monotonic() + ANSWER_S)

    def arrived(self, data: memoryview) -> None:
        """A message from the data link's thread that `is_probe`. What belongs to no probe here is dropped."""
        _, version, kind, id, number = _HEADER.unpack_from(data)
        if version != _VERSION:
            return
        if kind == _Kind.PING:
            self._echo(id, number)
        elif kind == _Kind.END:
            self._forget_answers(id)
        elif kind == _Kind.ECHO:
            with self._lock:
                awaited = self._awaited.get(id)
            if awaited is not None and awaited.qsize() < MAX_PINGS:
                awaited.put(number)

    def _echo(self, id: bytes, number: int) -> None:
        with self._lock:
            answering = self._answering.get(id)
            if answering is None or not answering.n_left or time.monotonic() > answering.until_s:
                return
            answering.n_left -= 1
            with suppress(LinkError):  # there is no way back yet: they ping again
                answering.link.send([_HEADER.pack(_MAGIC, _VERSION, _Kind.ECHO, id, number)], 0.0)

    def let_go(self) -> None:
        """Of those probes whose time is over; to be called again and again."""
        if self._answering:
            self._forget_answers()

    def _forget_answers(self, ended: bytes | None = None, all_of_them: bool = False) -> None:
        """Those that are over."""
        with self._lock:
            now_s = time.monotonic()
            over = [id for id, one in self._answering.items() if all_of_them or id == ended or now_s > one.until_s]
            for id in over:
                self._answering.pop(id).link.close()

    # ------------------------------------------------------------ the node that measures

    def ask(
        self, id: bytes, address: str, n_bytes: int, tell: Callable[[LinkFigures | None], None], is_brief: bool = False
    ) -> None:
        """`measure` soon, in another thread, which tells what was found."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="prima-probe", daemon=True)
            self._thread.start()
        with suppress(queue.Full):  # nobody asks for so many: as one that does not answer
            self._jobs.put_nowait(_Job(id, address, n_bytes, is_brief, tell, time.perf_counter() + ASKED_S))

    def _main(self) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Empty):
                job = self._jobs.get(timeout=KNOCK_S)
                within_s = job.until_s - time.perf_counter()
                job.tell(self.measure(job.id, job.address, job.n_bytes, job.is_brief, within_s))

    def measure(
        self, id: bytes, address: str, n_bytes: int, is_brief: bool = False, within_s: float = math.inf
    ) -> LinkFigures | None:
        """The way to the node at an address, which has to answer this probe, for activations of so many bytes; None:
        it does not, or not in time, or frames are lost on the way. `is_brief`: without the rate."""
        until_s = time.perf_counter() + within_s
        inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
        with self._lock:
            self._awaited[id] = inbox
        try:
            with closing(self._dial(address)) as link:
                pinger = _Pinger(id, link, inbox, self._stopping, until_s)
                return pinger.figures(min(n_bytes, MAX_PING_BYTES // 4), is_brief)
        except PrimaError as error:
            log.info("the link to %s is not known: %s", address, error)
            return None
        finally:
            with self._lock:
                del self._awaited[id]


class _Pinger:
    """Raises LinkError: LinkTimeout for what was lost, LinkClosed when it has to end, at `until_s`."""

    def __init__(
        self,
        id: bytes,
        link: SendLink,
        inbox: queue.SimpleQueue[int],
        stopping: threading.Event,
        until_s: float = math.inf,
    ) -> None:
        self._id, self._link, self._inbox, self._stopping, self._until_s = id, link, inbox, stopping, until_s
        self._number = 0

    def figures(self, n_bytes: int, is_brief: bool) -> LinkFigures:
        self._knock()
        until_s = time.perf_counter() + MEASURE_S
        short_s = self._trip_s(0, RUNS, until_s)
        token_s = self._trip_s(n_bytes, RUNS, until_s)
        there_s = token_s - short_s / 2
        bytes_s = 0.0 if is_brief else self._bytes_s(n_bytes, short_s, token_s, until_s)
        self._end()
        return LinkFigures(max(0.0, there_s - (n_bytes / bytes_s if bytes_s else 0.0)), bytes_s)

    def _bytes_s(self, n_bytes: int, short_s: float, token_s: float, until_s: float) -> float:
        try:
            large_s = self._trip_s(MAX_PING_BYTES, LARGE_RUNS, until_s)
        except LinkTimeout:  # a slow one: what the small ones say of it
            return min(n_bytes / max(token_s - short_s, _LEAST_S), MAX_PING_BYTES / LOST_AFTER_S)
        return (MAX_PING_BYTES - n_bytes) / max(large_s - token_s, _LEAST_S)

    def _end(self) -> None:
        with suppress(LinkError):  # else they end it by themselves
            self._link.send([_HEADER.pack(_MAGIC, _VERSION, _Kind.END, self._id, 0)], 0.0)

    def _knock(self) -> None:
        """Until there is a way to the other node, and one back."""
        until_s = time.perf_counter() + CONNECT_S
        while time.perf_counter() < until_s:
            with suppress(LinkTimeout):
                self._trip(0, KNOCK_S)
                return
        raise LinkTimeout(f"{self._link.peer} does not answer")

    def _trip_s(self, n_bytes: int, n_runs: int, until_s: float) -> float:
        """There, and the short way back."""
        times = [self._sure_trip(n_bytes)]
        while len(times) < n_runs and time.perf_counter() < until_s:
            times.append(self._sure_trip(n_bytes))
        return median(times)

    def _sure_trip(self, n_bytes: int) -> float:
        """One echo may be lost: nobody waits to send it."""
        with suppress(LinkTimeout):
            return self._trip(n_bytes, LOST_AFTER_S)
        return self._trip(n_bytes, LOST_AFTER_S)

    def _trip(self, n_bytes: int, timeout_s: float) -> float:
        self._number += 1
        header = _HEADER.pack(_MAGIC, _VERSION, _Kind.PING, self._id, self._number)
        parts: list[Buffer] = [header, bytes(n_bytes)] if n_bytes else [header]
        began_s = time.perf_counter()
        end_s = min(began_s + timeout_s, self._until_s)
        self._go_on()
        self._link.send(parts, max(0.0, end_s - began_s))
        try:
            while self._inbox.get(timeout=max(0.0, end_s - time.perf_counter())) != self._number:
                self._go_on()  # of an earlier ping, which was given up
        except queue.Empty:
            raise LinkTimeout(f"{self._link.peer} does not answer") from None
        return time.perf_counter() - began_s

    def _go_on(self) -> None:
        if self._stopping.is_set() or time.perf_counter() >= self._until_s:
            raise LinkClosed(f"the link to {self._link.peer} is not measured any more")
