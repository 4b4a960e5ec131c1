"""A ring in one process, for tests of plugins: nodes are threads, each on a backend of its own.

with ring("tiny.gguf", ["numpy", "mine"]) as cluster:
    assert cluster.tokens([1, 2, 3], 16) == greedy_ids("tiny.gguf", [1, 2, 3], 16)
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, pairwise
from types import TracebackType
from typing import Self

from prima_core.arch.families import open_model
from prima_core.engine.request import GREEDY, Event, Failed, Finished, Piece, Request, Sampling
from prima_core.errors import ClusterError, ConfigError
from prima_core.model.weights import Model
from prima_core.node.driver import State, Status
from prima_core.node.head import Head, HeadOptions
from prima_core.node.local import LocalOptions, ThreadNode, close_all
from prima_core.node.node import NodeOptions
from prima_core.plan.plan import Plan, Visit
from prima_core.plugins import Registry
from prima_core.ring.wire import WirePolicy

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
        if not isinstance(self.end, Failed):
            raise AssertionError(f"the request did not fail: {self.end}")
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
        if self.head.join_address is None:
            raise ConfigError("no node can join this head", hint="give HeadOptions a place to listen")
        return self.head.join_address

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


# ---------------------------------------------------------------- rings

OPTIONS = HeadOptions(wire=WirePolicy.F32)


@contextmanager
def ring(
    path: str | os.PathLike[str], backends: Sequence[str | NodeOptions], options: HeadOptions = OPTIONS
) -> Iterator[Cluster]:
    """The model, served by one node for each of `backends`: the head, head.2, head.3, ...; they talk inproc.

    Without a plan in `options` the layers are dealt out by turns, so that most nodes are visited twice. Raises
    PluginError when the head's backend cannot be opened, ClusterError for another node's, or when they do not serve
    within DEADLINE_S.
    """
    own, *others = (NodeOptions(backend, threads=1) if isinstance(backend, str) else backend for backend in backends)
    names = [options.name, *(f"{options.name}.{index}" for index in range(2, len(others) + 2))]
    with open_model(path) as model, ExitStack() as exits:
        plan = options.plan or dealt(model.spec.n_layers, names)
        head = replace(options, node=own, listen="inproc://", wait=len(names), plan=plan)
        cluster = exits.enter_context(Cluster(model, head))
        nodes: list[ThreadNode] = []
        exits.callback(close_all, nodes)
        exits.callback(cluster.head.stop_requests)  # first, so that nodes that leave do not look lost
        for name, node in zip(names[1:], others, strict=True):
            local = LocalOptions(1, cluster.address, options.name, model.path, node, options.log_level)
            nodes.append(ThreadNode(local, name, cluster.registry, SECRET, cluster.told.append))
        cluster.head.wait_until_serving(partial(_check_alive, nodes, time.monotonic() + DEADLINE_S))
        yield cluster


def _check_alive(nodes: Sequence[ThreadNode], until_s: float, status: Status) -> None:
    for fault in filter(None, (node.fault for node in nodes)):
        raise ClusterError(fault)
    if time.monotonic() > until_s:
        raise ClusterError(f"the ring does not serve within {DEADLINE_S:g} s: {status.reason}")


def dealt(n_layers: int, names: Sequence[str]) -> Plan:
    """Each node visited twice where there are layers enough; the first is the head."""
    n_visits = min(n_layers, 2 * len(names))
    ends = [n_layers * index // n_visits for index in range(n_visits + 1)]
    turns = zip(cycle(names), pairwise(ends), strict=False)
    return Plan(n_layers, names[0], tuple(Visit(name, start, stop) for name, (start, stop) in turns))
