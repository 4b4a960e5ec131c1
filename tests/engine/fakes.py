"""A tokenizer of bytes, and a bench that plays the ring around an engine: it launches, checks, and answers steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from prima_core.engine.engine import Engine, StepResult
from prima_core.engine.request import GREEDY, Event, Failed, Finished, Piece, Request, Sampled, Sampling
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import PrimaError
from prima_core.interfaces import Chunk, KvKind, KvOp

if TYPE_CHECKING:
    from prima_core.model.tokenizer import Tokenizer

EOS = 0
ROOM = Room(kv_tokens=100, chunk_tokens=4, max_sequences=8)


class ByteTokenizer:
    """Token n is the byte n; 0 ends the text."""

    eos_ids = frozenset({EOS})
    vocab_size = 256

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])

    def is_silent(self, id: int) -> bool:
        return id == EOS


def tokenizer() -> Tokenizer:
    return cast("Tokenizer", ByteTokenizer())  # all that an engine uses of one


def request(
    prompt: int | str = 1,
    max_tokens: int = 3,
    *,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    min_tokens: int = 0,
) -> Request:
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else (ord("p"),) * prompt
    return Request(ids, max_tokens, sampling, stop, ignore_eos, min_tokens)


class KvLedger:
    """The KV of one node, as a backend keeps it: it refuses what a backend would refuse."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.sequences: dict[int, tuple[int, int]] = {}  # length, capacity

    @property
    def reserved(self) -> int:
        return sum(capacity for _, capacity in self.sequences.values())

    def apply(self, planned: PlannedStep) -> None:
        for op in planned.step.kv:
            self._change(op)
        assert self.reserved <= self.room.kv_tokens
        assert len(self.sequences) <= self.room.max_sequences
        for chunk in planned.step.chunks:
            self._write(chunk)

    def _change(self, op: KvOp) -> None:
        if op.kind is KvKind.OPEN:
            assert op.sequence not in self.sequences, f"{op} is open already"
            assert op.capacity > 0
            self.sequences[op.sequence] = 0, op.capacity
        else:
            assert op.kind is KvKind.DROP
            self.sequences.pop(op.sequence, None)

    def _write(self, chunk: Chunk) -> None:
        length, capacity = self.sequences[chunk.sequence]
        assert chunk.start == length, "positions are written in order, without gaps"
        assert chunk.count >= 1
        assert chunk.start + chunk.count <= capacity
        self.sequences[chunk.sequence] = chunk.start + chunk.count, capacity


Says = Callable[[int, int], int]


def letters(number: int, index: int) -> int:
    """The token that sequence `number` says as its `index`-th: a, b, c, ..."""
    return ord("a") + index % 26


class Bench:
    """An engine whose steps are checked by the ledger of a node when they are launched."""

    def __init__(self, room: Room = ROOM, says: Says = letters, context_length: int = 1000) -> None:
        self.engine = Engine(tokenizer(), context_length, room)
        self.ledger = KvLedger(room)
        self.says = says
        self.events: dict[int, list[Event]] = {}

    def submit(self, number: int, wanted: Request) -> None:
        events = self.events.setdefault(number, [])
        self.engine.submit(number, wanted, events.append)

    def launch(self) -> PlannedStep | None:
        planned = self.engine.next_step()
        if planned is not None:
            self.ledger.apply(planned)
        return planned

    def launched(self) -> PlannedStep:
        planned = self.launch()
        assert planned is not None
        return planned

    def answer(self, planned: PlannedStep, error: PrimaError | None = None) -> None:
        said = ((want.sequence, Sampled(self.says(want.sequence, want.index))) for want in planned.wanted)
        self.engine.accept(StepResult(planned.number, () if error else tuple(said), error))

    def run(self) -> None:
        """One step at a time until there is nothing to do."""
        while (planned := self.launch()) is not None:
            self.answer(planned)

    # ------------------------------------------------------------ what came out

    def text(self, number: int) -> str:
        events = self.events[number]
        return "".join(event.text for event in events if isinstance(event, (Piece, Finished)))

    def finished(self, number: int) -> Finished:
        last = self.events[number][-1]
        assert isinstance(last, Finished)
        return last

    def failed(self, number: int) -> PrimaError:
        last = self.events[number][-1]
        assert isinstance(last, Failed)
        return last.error

    def has_ended(self, number: int) -> bool:
        return any(isinstance(event, (Finished, Failed)) for event in self.events[number])


def chunks_of(planned: PlannedStep) -> list[tuple[int, int, int]]:
    return [(chunk.sequence, chunk.start, chunk.start + chunk.count) for chunk in planned.step.chunks]


def kv_of(planned: PlannedStep) -> list[tuple[str, int]]:
    return [(op.kind.value, op.sequence) for op in planned.step.kv]
