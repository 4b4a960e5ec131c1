"""Real clusters: a head in this process, workers in others, and prompts through them."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from prima_core.engine.request import GREEDY, Event, Failed, Finished, Piece, Request, Sampling
from prima_core.model.weights import Model
from prima_core.node.driver import State, Status
from prima_core.node.head import Head, HeadOptions
from prima_core.node.join import JoinOptions, WorkerNode
from prima_core.node.local import LocalNode
from prima_core.node.network import with_port
from prima_core.node.node import NodeOptions
from prima_core.plan.plan import Plan, Visit
from prima_core.plugins import Registry
from prima_core.ring.security import format_token

SECRET = b"c" * 32
DEADLINE_S = 30.0  # of everything that comes in a second unless something is broken
NODE = NodeOptions(threads=1)
POLL_S = 0.005


def until(what: str, claim: Callable[[], bool], deadline_s: float = DEADLINE_S) -> float:
    """Wait until the claim is true; how long that took."""
    began_s = time.monotonic()
    while not claim():
        if time.monotonic() - began_s > deadline_s:
            raise AssertionError(f"{what} did not happen within {deadline_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - began_s


# ---------------------------------------------------------------- prompts


@dataclass
class Answer:
    """The events of one request as they come."""

    cluster: Cluster
    number: int
    inbox: queue.SimpleQueue[Event]
    tokens: list[int] = field(default_factory=list)
    end: Finished | Failed | None = None

    def take(self) -> None:
        event = self.inbox.get(timeout=DEADLINE_S)
        if isinstance(event, Piece):
            self.tokens.append(event.token)
        else:
            self.end = event

    def rest(self) -> list[int]:
        """All tokens. Raises the error of a failed request."""
        while self.end is None:
            self.take()
        if isinstance(self.end, Failed):
            raise self.end.error
        return self.tokens

    def error(self) -> Exception:
        while self.end is None:
            self.take()
        assert isinstance(self.end, Failed), self.end
        return self.end.error

    def cancel(self) -> None:
        self.cluster.head.cancel(self.number)


class Cluster:
    """A head that serves, until the block ends."""

    def __init__(self, model: Model, options: HeadOptions, secret: bytes = SECRET) -> None:
        self.told: list[str] = []
        self.registry = Registry.load({})
        self.head = Head(model, options, self.registry, secret, self.told.append)

    def __enter__(self) -> Self:
        self.head.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.head.close()
        self.registry.close()

    @property
    def status(self) -> Status:
        return self.head.driver.status

    @property
    def address(self) -> str:
        assert self.head.join_address is not None
        return self.head.join_address

    @property
    def local(self) -> Sequence[LocalNode]:
        return self.head._local

    def serves_with(self, *names: str) -> bool:
        status = self.status
        return status.state is State.SERVING and status.plan is not None and set(status.plan.nodes) == set(names)

    def until_serving_with(self, *names: str) -> float:
        return until(f"serving with {names}, not {self.status}", lambda: self.serves_with(*names))

    def submit(self, request: Request) -> Answer:
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return Answer(self, self.head.submit(request, inbox.put), inbox)

    def ask(self, prompt: Sequence[int], n: int, sampling: Sampling = GREEDY) -> Answer:
        return self.submit(Request(tuple(prompt), n, sampling, ignore_eos=True))

    def tokens(self, prompt: Sequence[int], n: int, sampling: Sampling = GREEDY) -> list[int]:
        return self.ask(prompt, n, sampling).rest()


def plan_of(*visits: tuple[str, int, int], in_flight: int = 0) -> Plan:
    return Plan(visits[-1][2], "head", tuple(Visit(*visit) for visit in visits), in_flight=in_flight)


# ---------------------------------------------------------------- workers


@contextmanager
def worker_thread(
    head: str,
    name: str,
    *places: Path,
    secret: bytes = SECRET,
    listen: str | None = None,
    advertise: Callable[[str], str] = str,
) -> Iterator[list[str]]:
    """`prima join` in a thread; gives the lines that it tells."""
    told: list[str] = []
    registry = Registry.load({})
    options = JoinOptions(head, listen or with_port(head, 0), name, places, advertise, NODE)
    worker = WorkerNode(options, registry, secret, told.append)
    thread = threading.Thread(target=worker.run, name=f"worker {name}")
    thread.start()
    try:
        yield told
    finally:
        worker.stop()
        thread.join(DEADLINE_S)
        registry.close()
        assert not thread.is_alive()


@contextmanager
def worker_process(head: str, name: str, models: Path, secret: bytes = SECRET) -> Iterator[subprocess.Popen[bytes]]:
    """`prima join` as a user types it."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "prima_core", "join", head, "--name", name, "--models", str(models)),
            *("--threads", "1", "--until-stdin-closes"),
        ],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PRIMA_TOKEN": format_token(secret)},
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
