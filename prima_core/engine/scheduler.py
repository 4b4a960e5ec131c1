"""Which tokens of which sequences go through the model next. Pure state: no I/O, no clock, no threads.

A step is either one prefill chunk of one sequence or one token of every sequence that is ready to decode; the two
take turns, so that neither starves. Chunks of a prompt do not wait for each other: they fill the ring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prima_core.engine.request import Request, Sampling
from prima_core.interfaces import Chunk, KvKind, KvOp, Step


@dataclass(frozen=True, slots=True)
class Room:
    """What the plan allows: KV positions over all sequences, tokens per prefill chunk, sequences at a time."""

    kv_tokens: int
    chunk_tokens: int
    max_sequences: int


@dataclass(slots=True)
class Sequence:
    """A request on its way. `ids` is the prompt and what was generated; positions below `n_launched` are in a step.

    `end_ids` are the tokens that end a generation."""

    number: int
    request: Request
    end_ids: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    n_launched: int = 0

    def __post_init__(self) -> None:
        self.ids.extend(self.request.prompt)

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def capacity(self) -> int:
        """KV positions that it may come to need: the last generated token never enters the cache."""
        return self.n_prompt + self.request.max_tokens - 1

    @property
    def n_pending(self) -> int:
        """Tokens that are known and not yet in a step."""
        return len(self.ids) - self.n_launched

    @property
    def is_prefilling(self) -> bool:
        return self.n_launched < self.n_prompt


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of the step whose next token is wanted: the `index`-th generated token of `sequence`.

    `recent` are the last tokens that a repetition penalty looks at, `generated` what the other penalties count; both
    are empty where there is no such penalty. `banned` tokens cannot be drawn.
    """

    row: int
    sequence: int
    sampling: Sampling
    index: int
    recent: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step with its number (rising by one) and the rows to sample from. Only the output part looks at `wanted`."""

    number: int
    step: Step
    wanted: tuple[Wanted, ...]


class Scheduler:
    """Waiting sequences in order of arrival, running ones, and the KV budget that lets them in."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free_tokens = room.kv_tokens
        self._drops: list[KvOp] = []  # to travel in the next step
        self._n_steps = 0
        self._last_was_prefill = False

    @property
    def kv_tokens_used(self) -> int:
        """KV positions that are reserved."""
        return self.room.kv_tokens - self._free_tokens

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is done, cancelled or failed; its room is given back with the next step."""
        if self.running.pop(sequence.number, None) is None:
            self.waiting = deque(other for other in self.waiting if other is not sequence)
            return
        self._free_tokens += sequence.capacity
        if sequence.n_launched:
            self._drops.append(KvOp(KvKind.DROP, sequence.number))

    def repeat_drops(self, step: Step) -> None:
        """The step failed on its way, so that not every node has seen its drops. What it opened fails with it."""
        if step.chunks:  # a step that only drops is not repeated: where it fails once it fails for ever
            self._drops.extend(op for op in step.kv if op.kind is KvKind.DROP)

    def reset(self, room: Room) -> None:
        """A new epoch: nothing runs, nothing is cached, the room may be another. Waiting sequences stay."""
        self.room = room
        self.running.clear()
        self._free_tokens = room.kv_tokens
        self._drops.clear()

    def next_step(self) -> PlannedStep | None:
        """The next step to launch, or None while there is nothing to do until a result comes."""
        self._admit()
        prefilling = next((s for s in self.running.values() if s.is_prefilling), None)
        decoding = [s for s in self.running.values() if not s.is_prefilling and s.n_pending]
        if prefilling is not None and not (self._last_was_prefill and decoding):
            self._last_was_prefill = True
            return self._plan([(prefilling, min(self.room.chunk_tokens, prefilling.n_prompt - prefilling.n_launched))])
        self._last_was_prefill = False
        if decoding:
            return self._plan([(sequence, 1) for sequence in decoding])
        return self.empty_step() if self._drops else None  # nothing to compute: only give room back

    def empty_step(self) -> PlannedStep:
        """A step without tokens: it gives back room, and proves that what went before it is through."""
        return self._plan([])

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.room.max_sequences:
            sequence = self.waiting[0]
            if sequence.capacity > self._free_tokens:
                return  # first come, first served: nobody overtakes a long one
            self.waiting.popleft()
            self.running[sequence.number] = sequence
            self._free_tokens -= sequence.capacity

    def _plan(self, parts: Iterable[tuple[Sequence, int]]) -> PlannedStep:
        """A step of the next `count` tokens of these sequences. One is opened in the step of its first tokens, so that
        it fails with that step and with no other one."""
        chunks: list[Chunk] = []
        tokens: list[int] = []
        wanted: list[Wanted] = []
        ops, self._drops = self._drops, []
        for sequence, count in parts:
            start, stop = sequence.n_launched, sequence.n_launched + count
            if start == 0:
                ops.append(KvOp(KvKind.OPEN, sequence.number, capacity=sequence.capacity))
            chunks.append(Chunk(sequence.number, start, count))
            tokens.extend(sequence.ids[start:stop])
            sequence.n_launched = stop
            if stop == len(sequence.ids):
                wanted.append(_wanted(len(tokens) - 1, sequence))
        self._n_steps += 1
        return PlannedStep(self._n_steps, Step(tuple(chunks), tuple(ops), tuple(tokens)), tuple(wanted))


def _wanted(row: int, sequence: Sequence) -> Wanted:
    """With the history that its penalties look at, and no more: it is copied for each token."""
    sampling, n_generated = sequence.request.sampling, sequence.n_generated
    recent = generated = banned = ()  # type: tuple[int, ...]
    if sampling.repetition_penalty != 1:
        window = len(sequence.ids) if sampling.repetition_window < 0 else sampling.repetition_window
        recent = tuple(sequence.ids[max(0, len(sequence.ids) - window) :])
    if sampling.frequency_penalty or sampling.presence_penalty:
        generated = tuple(sequence.ids[sequence.n_prompt :])
    if n_generated < sequence.request.min_tokens:
        banned = sequence.end_ids
    return Wanted(row, sequence.number, sampling, n_generated, recent, generated, banned)
