"""A tokenizer of bytes, and a bench that plays the ring around an engine: it launches, checks, and answers steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from prima_core.engine.engine import MAX_WAITING, Engine, StepResult
from prima_core.engine.request import GREEDY, Event, Failed, Finished, Piece, Request, Sampled, Sampling
from prima_core.engine.scheduler import PlannedStep, Room
from prima_core.errors import FrameError, PrimaError
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
    """The KV of one node, as a backend keeps it: it refuses what a backend would refuse.

    `boundless`: a node that has missed steps holds, for a moment, what they should have dropped.
    """

    def __init__(self, room: Room, boundless: bool = False) -> None:
        self.room = room
        self.boundless = boundless
        self.held: dict[int, list[int]] = {}  # the ids at the written positions
        self.capacities: dict[int, int] = {}

    @property
    def reserved(self) -> int:
        return sum(self.capacities.values())

    def apply(self, planned: PlannedStep) -> None:
        """Raises FrameError, with nothing changed, for a step that builds on what is not here."""
        before = {number: list(ids) for number, ids in self.held.items()}, dict(self.capacities)
        try:
            self._apply(planned)
        except FrameError:
            self.held, self.capacities = before
            raise

    def _apply(self, planned: PlannedStep) -> None:
        for op in planned.step.kv:
            self._change(op)
            assert self.boundless or self.reserved <= self.room.kv_tokens
            assert self.boundless or len(self.held) <= self.room.max_sequences
        tokens = list(planned.step.tokens)
        for chunk in planned.step.chunks:
            self._write(chunk, tokens[: chunk.count])
            del tokens[: chunk.count]
        assert not tokens

    def _change(self, op: KvOp) -> None:
        if op.kind is KvKind.DROP:
            self.held.pop(op.sequence, None)
            self.capacities.pop(op.sequence, None)
            return
        ids = [] if op.kind is KvKind.OPEN else self._copied(op)
        if op.kind is KvKind.MOVE:
            del self.held[op.source], self.capacities[op.source]
        require(op.sequence not in self.held, f"{op} is open already")
        assert op.capacity > 0
        self.held[op.sequence], self.capacities[op.sequence] = ids, op.capacity

    def _copied(self, op: KvOp) -> list[int]:
        require(op.source in self.held, f"the source of {op} is unknown")
        require(op.length <= len(self.held[op.source]), f"{op} is longer than its source")
        assert op.length <= op.capacity
        return self.held[op.source][: op.length]

    def _write(self, chunk: Chunk, tokens: list[int]) -> None:
        require(chunk.sequence in self.held, f"{chunk} is not open")
        held = self.held[chunk.sequence]
        require(chunk.start <= len(held), f"{chunk} leaves a gap")
        assert chunk.start == len(held), "a position is written once"
        assert chunk.count == len(tokens) >= 1
        held += tokens
        assert len(held) <= self.capacities[chunk.sequence]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FrameError(otherwise)


Says = Callable[[int, int], int]


def letters(number: int, index: int) -> int:
    """The token that sequence `number` says as its `index`-th: a, b, c, ..."""
    return ord("a") + index % 26


class Bench:
    """An engine whose steps are checked by the ledger of a node when they are launched."""

    def __init__(
        self,
        room: Room = ROOM,
        says: Says = letters,
        context_length: int = 1000,
        context_shift: bool = False,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.engine = Engine(tokenizer(), context_length, room, context_shift, max_waiting)
        self.ledger = KvLedger(room)
        self.says = says
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[Event]] = {}

    def submit(self, number: int, wanted: Request) -> None:
        events = self.events.setdefault(number, [])
        self.engine.submit(number, wanted, events.append)
        self.requests[number] = wanted

    def launch(self) -> PlannedStep | None:
        planned = self.engine.next_step()
        if planned is not None:
            self.ledger.apply(planned)
            self.check_held(self.ledger, planned)
        return planned

    def check_held(self, ledger: KvLedger, planned: PlannedStep) -> None:
        """However it came there: before a wanted token is what was asked and said, as long as nothing shifts."""
        sequences = [chunk.sequence for chunk in planned.step.chunks for _ in range(chunk.count)]
        for want in planned.wanted:
            held, so_far = ledger.held[sequences[want.row]], self.so_far(want.sequence)
            if len(so_far) <= self.engine.context_length:
                assert held == so_far

    def so_far(self, number: int) -> list[int]:
        """The ids of prompt and answer."""
        return [*self.requests[number].prompt, *(e.token for e in self.events[number] if isinstance(e, Piece))]

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
