"""Workers with a backend that only counts, joined by links that are function calls."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from prima_core.engine.engine import StepResult
from prima_core.engine.request import GREEDY, Sampled
from prima_core.engine.scheduler import PlannedStep, Wanted
from prima_core.errors import FrameError, LinkTimeout
from prima_core.interfaces import Buffer, Chunk, Device, KvOp, KvType, Layers, Shard, Slice, Step, Store, Weight
from prima_core.memory.system import System, host
from prima_core.model.spec import ModelSpec
from prima_core.plan.plan import Plan, Residency, Visit
from prima_core.ring import wire as wires
from prima_core.ring.gather import row_bytes
from prima_core.ring.reports import Assignment, Collected, LoadFailed, Loading, Ready, Report
from prima_core.ring.serving import Holding
from prima_core.ring.times import Reads
from prima_core.ring.wire import Epoch, WirePolicy
from prima_core.ring.worker import Worker
from tests.arch.small import ArrayStore, SmallModel, small_model, small_spec

if TYPE_CHECKING:
    from prima_core.model.weights import Model

N_LAYERS = 6
VOCAB = 20_000
DEADLINE_S = 20.0  # of everything that comes at once unless something is broken
FIRST = Epoch(run_id=5, counter=1)
SMALL = small_model(dataclasses.replace(small_spec(n_layers=N_LAYERS), vocab_size=VOCAB))


def rows_for(visit: int, number: int, n_rows: int = 1, columns: int = SMALL.spec.d_model) -> bytes:
    return b"".join(wires.encode_rows(FIRST, number, visit, np.zeros((n_rows, columns), np.float32)))


def after(token: int) -> Sampled:
    """What the whole model answers to a token: no other order of its layers would give the same."""
    value = token
    for layer in range(N_LAYERS):
        value = value * 2 + layer
    return Sampled(value % VOCAB)


class FakeStore(ArrayStore):
    """A store that says it streams every layer when it is told to: each `acquire` then reads the layer."""

    def __init__(self, model: SmallModel, holding: Holding) -> None:
        super().__init__(model)
        self.holding = holding
        self.has_started = self.is_closed = False
        self.read_bytes = self.expert_hits = self.expert_misses = 0
        self.stall_s = self.reading_s = 0.0
        self.stall: Callable[[], float] = lambda: 0.0  # does as if an `acquire` waited so many seconds

    @property
    def pinned_bytes(self) -> int:
        return 1000 - self.streamed_bytes

    @property
    def streamed_bytes(self) -> int:
        return self.holding.streamed_bytes

    @property
    def buffer_bytes(self) -> int:
        return self.holding.buffer_bytes

    def stats(self) -> Reads:
        return self

    @property
    def copied_bytes(self) -> int:
        return 0

    @property
    def device_bytes(self) -> int:
        return 0

    def resize(self, pinned_bytes: int) -> None:
        """The governor of a test's node may want it."""

    def lost_bytes(self) -> int | None:
        return None

    def start(self) -> None:
        assert not self.held
        self.has_started = True

    def pinned_ends(self) -> Sequence[Weight]:
        return [] if self.holding.streamed_bytes else [self.shared_weights[name] for name in self.holding.ends]

    def is_streamed(self, name: str) -> bool:
        return bool(self.holding.streamed_bytes)

    def stays(self, name: str) -> bool:
        return not self.is_streamed(name)

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        if self.has_started and self.holding.streamed_bytes:
            self.read_bytes += 1
            self.expert_hits += 3
            self.expert_misses += 1
            self.stall_s += self.stall()
        return super().acquire(layer)

    def close(self) -> None:
        self.is_closed = True


class CountingShard:
    """Keeps a log of its calls; breaks when told to."""

    def __init__(self, node: CountingBackend, part: Slice, store: Store) -> None:
        self._node = node
        self._part = part
        self._store = store

    def embed(self, step: Step) -> NDArray[np.float32]:
        assert self._part.has_input
        self._node.called("embed")
        columns = np.zeros((step.n_tokens, SMALL.spec.d_model), np.float32)
        columns[:, 0] = step.tokens
        return columns

    def run(self, layers: Layers, activation: NDArray[np.float32], step: Step) -> NDArray[np.float32]:
        assert layers in self._part.layers
        self._node.called("run", layers, step)
        self._node.before_run()
        if self._node.refuses in [chunk.sequence for chunk in step.chunks]:
            raise FrameError(f"sequence {self._node.refuses} is not open")
        out = activation.copy()
        for layer in layers:
            self._store.acquire(layer)
            out[:, 0] = out[:, 0] * 2 + layer
            self._store.release(layer)
        return out

    def logits(self, activation: NDArray[np.float32], rows: Sequence[int]) -> NDArray[np.float32]:
        assert self._part.has_output
        self._node.called("logits")
        out = np.zeros((len(rows), VOCAB), np.float32)
        out[np.arange(len(rows)), activation[list(rows), 0].astype(int) % VOCAB] = 1
        return self._node.change_logits(out)

    def close(self) -> None:
        self._node.closed.append("shard")
        self._node.called("close")


class CountingBackend:
    def __init__(self) -> None:
        self.calls: set[str] = set()
        self.steps: list[tuple[Layers, Step]] = []
        self.closed: list[str] = []
        self.memory_bytes = {"count:cpu": 1000}  # of each device, by its id
        self.parts: list[Slice] = []  # loaded
        self.used: list[str] = []  # the device of each
        self.breaks: dict[str, Exception] = {}  # by the call that shall raise it, once
        self.before_run: Callable[[], None] = lambda: None
        self.refuses: int | None = None  # a sequence that is not open
        self.change_logits: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda logits: logits

    def called(self, call: str, *step: object) -> None:
        self.calls.add(call)
        if call in self.breaks:
            raise self.breaks.pop(call)
        if step:
            self.steps.append(cast("tuple[Layers, Step]", step))

    def devices(self) -> Sequence[Device]:
        if "load" in self.calls:
            self.called("devices after the load")
        return [Device(id_, memory_bytes) for id_, memory_bytes in self.memory_bytes.items()]

    def describe(self) -> dict[str, str]:
        return {}

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        self.called("load")
        self.called(f"load on {device}")
        self.parts.append(part)
        self.used.append(device)
        for layer in (layer for layers in part.layers for layer in layers):
            store.acquire(layer)  # as a backend does, which brings it into memory
            store.release(layer)
        store.shared()
        return CountingShard(self, part, store)

    def close(self) -> None:
        self.closed.append("backend")


class CallLink:
    """A link that is a call; what is sent to a node that does not exist times out."""

    def __init__(self, ring: Ring, peer: str) -> None:
        self._ring = ring
        self.peer = peer

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        if self.peer in self._ring.deaf:
            self._ring.waited.set()
            raise LinkTimeout(f"{self.peer} does not read")
        frame = memoryview(b"".join(parts))
        self._ring.frames.append((self.peer, frame))
        self._ring.workers[self.peer].arrived(frame)

    def close(self) -> None:
        self._ring.closed_links.append(self.peer)


class Ring:
    """Workers by name, the first being the head's. Reports of all of them come to `reports`."""

    def __init__(self, *names: str) -> None:
        self.head = names[0]
        self.backends = {name: CountingBackend() for name in names}
        self.reports: queue.Queue[tuple[str, Report]] = queue.Queue()
        self.frames: list[tuple[str, memoryview]] = []
        self.closed_links: list[str] = []
        self.deaf: set[str] = set()
        self.waited = threading.Event()  # a send has timed out
        self.stores: dict[str, FakeStore] = {}  # of each node that has loaded
        self.workers = {name: self._worker(name) for name in names}
        self.numbers = 0

    def _worker(self, name: str) -> Worker:
        def open_store(model: Model, holding: Holding, system: System) -> FakeStore:
            self.stores[name] = FakeStore(cast("SmallModel", model), holding)
            return self.stores[name]

        worker = Worker(
            name,
            lambda: self.backends[name],
            lambda address: CallLink(self, address),
            lambda report: self.reports.put((name, report)),
            host(),
            open_store,
        )
        worker.start()
        return worker

    # ------------------------------------------------------------ loading

    def load(
        self,
        *visits: tuple[str, int, int] | Visit,
        wire: WirePolicy = WirePolicy.F32,
        epoch: Epoch = FIRST,
        kv_type: KvType = KvType.F16,
        context: int = 0,
        end_device: str = "",
        streaming: Sequence[str] = (),
        gather_rows: int = 100,
        output: str = "",
    ) -> Plan:
        """Assign these visits, and wait until every node is ready. Nodes that are `streaming` keep no layer."""
        own = tuple(visit if isinstance(visit, Visit) else Visit(*visit) for visit in visits)
        plan = Plan(N_LAYERS, self.head, own, kv_tokens=1000, kv_type=kv_type, context=context, end_device=end_device)
        plan = replace(plan, output=output)
        residency = tuple(Residency(name, "", 1000, 0, 600, 50) for name in streaming)
        plan = replace(plan, residency=residency, gather_bytes=gather_rows * row_bytes(SMALL.spec))
        for name in plan.nodes:
            self.workers[name].load(self.assignment(plan, epoch, wire))
        waiting = set(plan.nodes)
        while waiting:
            name, report = self.report()
            assert isinstance(report, (Loading, Ready)), report
            waiting -= {name} if isinstance(report, Ready) else set()
        return plan

    def assignment(self, plan: Plan, epoch: Epoch = FIRST, wire: WirePolicy = WirePolicy.F32) -> Assignment:
        return Assignment(epoch, plan, lambda: cast("Model", SMALL), wire, {name: name for name in plan.nodes})

    def report(self) -> tuple[str, Report]:
        return self.reports.get(timeout=DEADLINE_S)

    def outcome(self) -> tuple[str, Report]:
        """The next report that is no progress."""
        while isinstance((pair := self.report())[1], Loading):
            pass
        return pair

    def load_error(self) -> tuple[str, Exception]:
        name, report = self.outcome()
        assert isinstance(report, LoadFailed), report
        return name, report.error

    # ------------------------------------------------------------ steps

    def launch(self, *tokens: int, kv: tuple[KvOp, ...] = (), wants: bool = True, epoch: Epoch = FIRST) -> int:
        """A row for each token, each of a sequence of its own, which is named as the token."""
        self.numbers += 1
        step = Step(tuple(Chunk(token, 0, 1) for token in tokens), kv, tokens)
        wanted = tuple(Wanted(row, token, GREEDY, 0) for row, token in enumerate(tokens)) if wants else ()
        self.workers[self.head].launch(epoch, PlannedStep(self.numbers, step, wanted))
        return self.numbers

    def collect(self) -> StepResult:
        name, report = self.outcome()
        assert name == self.head
        assert isinstance(report, Collected), report
        return report.result

    def answer(self, *tokens: int) -> StepResult:
        number = self.launch(*tokens)
        result = self.collect()
        assert result.number == number
        return result

    def works(self) -> bool:
        """Whether a step goes through as it should."""
        return self.answer(7).tokens == ((7, after(7)),)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()
            assert not worker._thread.is_alive()
