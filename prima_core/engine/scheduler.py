"""Which tokens of which sequences go through the model next. Pure state: no I/O, no clock, no threads.

A step is either one prefill chunk of one sequence or one token of every sequence that is ready to decode; the two
take turns, so that neither starves. Chunks of a prompt do not wait for each other: they fill the ring.

First come, first served: a request is let in when the prompts before it are launched as a whole, and there is room for
all that it may come to need. So one that begins as they do finds that part there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prima_core.engine.facts import EngineFacts, SequenceFacts
from prima_core.engine.kv import KvBook, KvSequence
from prima_core.engine.request import Request, Sampling
from prima_core.interfaces import Chunk, Step

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What the plan allows: KV positions over all sequences, tokens per prefill chunk, sequences at a time."""

    kv_tokens: int
    chunk_tokens: int
    max_sequences: int


@dataclass(slots=True)
class Sequence:
    """A request on its way. `ids` is the prompt and what was generated. `kv` is there from when it is let in, with
    the same ids until the context shifts. `capacity`: KV positions that it may come to need. `end_ids` are the tokens
    that end a generation."""

    number: int
    request: Request
    capacity: int
    end_ids: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    kv: KvSequence | None = None
    n_cached: int = 0
    n_shifted: int = 0
    _counts: dict[int, int] = field(default_factory=dict)  # of generated tokens
    _seen: dict[int, None] = field(default_factory=dict)  # all tokens, where a penalty looks at all

    def __post_init__(self) -> None:
        self.ids.extend(self.request.prompt)
        if self.request.sampling.repetition_window < 0:
            self._seen = dict.fromkeys(self.ids)

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def recent(self) -> tuple[int, ...]:
        """What the repetition penalty looks at; a token may come several times."""
        window = self.request.sampling.repetition_window
        return tuple(self._seen) if window < 0 else tuple(self.ids[max(0, len(self.ids) - window) :])

    @property
    def counts(self) -> dict[int, int]:
        """How often each generated token has come: as it is now."""
        return dict(self._counts)

    def append(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.request.sampling.repetition_window < 0:
            self._seen[token] = None
        self.ids.append(token)
        if self.kv is not None:
            self.kv.ids.append(token)

    def facts(self, kv: KvSequence) -> SequenceFacts:
        return SequenceFacts(
            number=self.number,
            is_prefilling=kv.is_prefilling,
            n_prompt=self.n_prompt,
            n_generated=self.n_generated,
            n_cached=self.n_cached,
            n_computed=kv.length,
            n_shifted=self.n_shifted,
            capacity=kv.capacity,
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of the step whose next token is wanted: the `index`-th generated token of `sequence`.

    `recent` are the tokens that a repetition penalty looks at, `generated` how often each came that the other penalties
    count; both are empty where there is no such penalty. `banned` tokens cannot be drawn.
    """

    row: int
    sequence: int
    sampling: Sampling
    index: int
    recent: tuple[int, ...] = ()
    generated: Mapping[int, int] = field(default_factory=dict)
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
        self._kv = KvBook(room)
        self._n_steps = 0
        self._last_was_prefill = False

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, keep: bool) -> None:
        """The sequence is done or cancelled (`keep` its KV for others), or failed."""
        if self.running.pop(sequence.number, None) is None:
            self.waiting = deque(other for other in self.waiting if other is not sequence)
        elif sequence.kv is not None:
            self._kv.close(sequence.kv, keep)

    def collected(self, number: int) -> None:
        """Step `number` and all before it are through, or have failed."""
        self._kv.collected(number)

    def step_failed(self, step: Step) -> list[int]:
        """The step failed on its way; the running requests whose tokens were in it."""
        self._kv.step_failed(step)
        written = {chunk.sequence for chunk in step.chunks}
        return [s.number for s in self.running.values() if s.kv is not None and s.kv.number in written]

    def reset(self, room: Room) -> None:
        """A new epoch: nothing runs, nothing is cached, the room may be another. Waiting sequences stay."""
        self.room = room
        self.running.clear()
        self._kv.reset(room)

    def facts(self) -> EngineFacts:
        return EngineFacts(
            running=tuple(s.facts(s.kv) for s in self.running.values() if s.kv is not None),
            n_waiting=len(self.waiting),
            n_kept=self._kv.n_kept,
            kv_tokens=self.room.kv_tokens,
            kv_running=self._kv.tokens_open,
            kv_kept=self._kv.tokens_kept,
            max_sequences=self.room.max_sequences,
        )

    # ------------------------------------------------------------ steps

    def next_step(self) -> PlannedStep | None:
        """The next step to launch, or None while there is nothing to do until a result comes."""
        decoding = [(s, s.kv) for s in self.running.values() if s.kv is not None and s.kv.is_decoding]
        if not (self._last_was_prefill and decoding):
            prefilling = self._next_prefill()
            if prefilling is not None:
                self._last_was_prefill = True
                sequence, kv = prefilling
                return self._plan([(sequence, kv, min(self.room.chunk_tokens, kv.n_prefill - kv.length))])
        self._last_was_prefill = False
        if decoding:
            return self._plan([(sequence, kv, 1) for sequence, kv in decoding])
        return self.empty_step() if self._kv.wants_step else None  # nothing to compute: only give room back

    def empty_step(self) -> PlannedStep:
        """A step without tokens: it gives back room, and proves that what went before it is through."""
        return self._plan([])

    def _next_prefill(self) -> tuple[Sequence, KvSequence] | None:
        for sequence in self.running.values():
            if sequence.kv is not None and sequence.kv.is_full:
                return sequence, self._shift(sequence, sequence.kv)
            if sequence.kv is not None and sequence.kv.is_prefilling:
                return sequence, sequence.kv
        return self._admit()

    def _admit(self) -> tuple[Sequence, KvSequence] | None:
        """Let the first that waits in: nobody overtakes a long one."""
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        kv = self._kv.open(sequence.ids, sequence.capacity, sequence.request.reuse_prefix)
        if kv is None:
            return None
        self.running[sequence.number] = self.waiting.popleft()
        sequence.kv, sequence.n_cached = kv, kv.length
        return sequence, kv

    def _shift(self, sequence: Sequence, kv: KvSequence) -> KvSequence:
        """No position is left for the last token: of what need not be kept forget the older half. The rest stands at
        other positions from now on, so it is computed anew; its beginning is not."""
        n_keep = min(max(1, sequence.request.n_keep), kv.capacity // 2)
        n_gone = (len(kv.ids) - n_keep) // 2
        sequence.kv = self._kv.replace(kv, kv.ids[:n_keep] + kv.ids[n_keep + n_gone :], n_keep)
        sequence.n_shifted += n_gone
        log.info("request %d: its context is full, %d tokens after the first %d go", sequence.number, n_gone, n_keep)
        return sequence.kv

    def _plan(self, parts: Iterable[tuple[Sequence, KvSequence, int]]) -> PlannedStep:
        """A step of the next `count` tokens of these sequences."""
        self._n_steps += 1
        chunks: list[Chunk] = []
        tokens: list[int] = []
        wanted: list[Wanted] = []
        for sequence, kv, count in parts:
            start, stop = kv.length, kv.length + count
            chunks.append(Chunk(kv.number, start, count))
            tokens.extend(kv.ids[start:stop])
            kv.length, kv.last_step = stop, self._n_steps
            if stop == len(kv.ids):
                wanted.append(_wanted(len(tokens) - 1, sequence))
        return PlannedStep(self._n_steps, Step(tuple(chunks), self._kv.take_operations(), tuple(tokens)), tuple(wanted))


def _wanted(row: int, sequence: Sequence) -> Wanted:
    """With the history that its penalties look at, and no more: it is copied for each token."""
    sampling, n_generated = sequence.request.sampling, sequence.n_generated
    recent = sequence.recent if sampling.repetition_penalty != 1 else ()
    generated = sequence.counts if sampling.frequency_penalty or sampling.presence_penalty else {}
    banned = sequence.end_ids if n_generated < sequence.request.min_tokens else ()
    return Wanted(row, sequence.number, sampling, n_generated, recent, generated, banned)
