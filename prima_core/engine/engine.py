"""Sequences from submit to the last piece of text. A state machine: `next_step` and `accept`, no I/O, no threads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prima_core.engine.facts import EngineFacts
from prima_core.engine.kv import MAX_TOKEN
from prima_core.engine.request import Event, Failed, Finished, FinishReason, Piece, Request, Sampled, Sampling
from prima_core.engine.scheduler import PlannedStep, Room, Scheduler, Sequence
from prima_core.engine.text import TextStream
from prima_core.errors import Busy, ClusterError, PrimaError, RequestError

if TYPE_CHECKING:
    from prima_core.model.tokenizer import Tokenizer

Deliver = Callable[[Event], None]

MAX_WAITING = 512
MAX_LOGPROBS = 20
MAX_BIASES = 1024
_RANGES = (
    ("temperature", 0, sys.float_info.max),
    ("top_k", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("repetition_window", -1, math.inf),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
)
"""Fields of Sampling with the least and the greatest that they may be. NaN is in no range."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step: sequence number and token (or what went wrong) of each wanted row, or the error that
    ended it as a whole."""

    number: int
    tokens: tuple[tuple[int, Sampled | PrimaError], ...] = ()
    error: PrimaError | None = None


@dataclass(slots=True)
class _Stream:
    sequence: Sequence
    text: TextStream
    deliver: Deliver


class Engine:
    """Owned by one thread. `deliver` callbacks are called from that thread and must not block.

    `context_shift`: a sequence that reaches the context goes on, and forgets its older part. `max_waiting`: requests
    beyond it are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        room: Room,
        context_shift: bool = False,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(room)
        self._streams: dict[int, _Stream] = {}
        self._in_flight: dict[int, PlannedStep] = {}
        self._context_shift = context_shift
        self._max_waiting = max_waiting
        self.context_length = context_length

    @property
    def room(self) -> Room:
        return self._scheduler.room

    @property
    def is_idle(self) -> bool:
        """Nothing is running and nothing is in flight; requests may still wait."""
        return not self._scheduler.running and not self._in_flight

    @property
    def n_in_flight(self) -> int:
        return len(self._in_flight)

    def facts(self) -> EngineFacts:
        """What runs, waits and is kept now; to be called from the owning thread, and read from any."""
        return self._scheduler.facts()

    def submit(self, number: int, request: Request, deliver: Deliver) -> None:
        """Queue a request under a fresh number; its events go to `deliver`.

        Raises RequestError if it can never run, Busy when too many are waiting.
        """
        self._check(request)
        if len(self._scheduler.waiting) >= self._max_waiting:
            raise Busy(f"{self._max_waiting} requests are waiting already", hint="ask again later, or see --queue")
        sequence = Sequence(number, request, self._capacity(request), tuple(sorted(self._tokenizer.eos_ids)))
        self._streams[number] = _Stream(sequence, TextStream(self._tokenizer, request.stop), deliver)
        self._scheduler.add(sequence)

    def cancel(self, number: int) -> None:
        """End a request that nobody wants any more. Idempotent."""
        stream = self._streams.get(number)
        if stream is not None:
            self._finish(stream, FinishReason.CANCELLED)

    def next_step(self) -> PlannedStep | None:
        planned = self._scheduler.next_step()
        if planned is not None:
            self._in_flight[planned.number] = planned
        return planned

    def probe(self) -> PlannedStep:
        """A step without tokens, to be sent behind those in flight: when it comes back first they are lost."""
        planned = self._scheduler.empty_step()
        self._in_flight[planned.number] = planned
        return planned

    def accept(self, result: StepResult) -> None:
        """Take the result of a step: sequences grow, end, or fail, and their events are delivered.

        Results come in the order of the steps: a step before this one that has not come was lost on its way.
        """
        planned = self._in_flight.pop(result.number, None)
        if planned is None:
            return  # a step of an epoch that was given up
        for number in [number for number in self._in_flight if number < result.number]:
            self._fail_step(self._in_flight.pop(number), _lost())
        self._scheduler.collected(result.number)
        if result.error is not None:
            self._fail_step(planned, result.error)
        for number, sampled in result.tokens:
            stream = self._streams.get(number)
            if isinstance(sampled, PrimaError):
                self.fail([number], sampled)
            elif stream is not None:
                self._grow(stream, sampled)

    def _fail_step(self, planned: PlannedStep, error: PrimaError) -> None:
        self.fail(self._scheduler.step_failed(planned.step), error)

    def fail(self, numbers: Iterable[int], error: PrimaError) -> None:
        """End these requests with an error."""
        for number in numbers:
            stream = self._streams.pop(number, None)
            if stream is not None:
                self._scheduler.remove(stream.sequence, keep=False)
                stream.deliver(Failed(error))

    def restart(self, room: Room, error: PrimaError) -> None:
        """A new epoch: what runs ends with `error`, what waits goes on waiting unless it can never fit the new room."""
        self.fail(tuple(self._scheduler.running), error)
        self._in_flight.clear()
        self._scheduler.reset(room)
        for sequence in tuple(self._scheduler.waiting):
            try:
                self._check(sequence.request)
            except RequestError as never:
                self.fail([sequence.number], never)

    def stop(self, error: PrimaError) -> None:
        """End everything, also what waits."""
        self.fail(tuple(self._streams), error)

    def _capacity(self, request: Request) -> int:
        """KV positions that it may come to need: the last generated token never enters the cache."""
        n_positions = len(request.prompt) + request.max_tokens - 1
        return min(n_positions, self.context_length) if self._context_shift else n_positions

    def _check(self, request: Request) -> None:
        _check_values(request)
        _check_sampling(request.sampling, self._tokenizer.vocab_size)
        n_prompt, capacity = len(request.prompt), self._capacity(request)
        if max(n_prompt, capacity) > self.context_length:
            raise RequestError(
                f"the prompt has {n_prompt} tokens and {request.max_tokens} are wanted,"
                f" the context has {self.context_length}",
                param="max_tokens",
                code="context_length_exceeded",
                hint="shorten the prompt, lower max_tokens, or serve with a longer context (-c)",
            )
        if capacity > self._scheduler.room.kv_tokens:
            raise RequestError(
                f"the request needs {capacity} KV positions, the cluster has memory for {self.room.kv_tokens}",
                param="max_tokens",
                code="context_length_exceeded",
                hint="lower max_tokens, or add memory or nodes",
            )

    def _grow(self, stream: _Stream, sampled: Sampled) -> None:
        sequence, token = stream.sequence, sampled.token
        sequence.append(token)
        if token in self._tokenizer.eos_ids and not sequence.request.ignore_eos:
            self._finish(stream, FinishReason.STOP)
            return
        text = stream.text.push(token, may_stop=sequence.n_generated > sequence.request.min_tokens)
        stream.deliver(Piece(text, sampled))
        if stream.text.stopped:
            self._finish(stream, FinishReason.STOP)
        elif sequence.n_generated >= sequence.request.max_tokens:
            self._finish(stream, FinishReason.LENGTH)

    def _finish(self, stream: _Stream, reason: FinishReason) -> None:
        sequence = stream.sequence
        del self._streams[sequence.number]
        self._scheduler.remove(sequence, keep=True)
        held = "" if stream.text.stopped else stream.text.flush()
        counts = sequence.n_prompt, sequence.n_generated, sequence.n_cached, sequence.n_shifted
        stream.deliver(Finished(reason, held, *counts))


def _lost() -> ClusterError:
    return ClusterError("a part of the answer was lost between the nodes", hint="ask again")


def _check_values(request: Request) -> None:
    if not request.prompt:
        raise RequestError("the prompt is empty", param="messages", hint="send at least one token")
    for token in (min(request.prompt), max(request.prompt)):
        if not 0 <= token <= MAX_TOKEN:
            raise RequestError(f"token id {token} is outside the vocabulary", param="messages")
    for name, value, is_right in (
        ("max_tokens", request.max_tokens, request.max_tokens >= 1),
        ("min_tokens", request.min_tokens, 0 <= request.min_tokens <= request.max_tokens),
    ):
        _demand(is_right, name, value)


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    for name, lowest, highest in _RANGES:
        value: float = getattr(sampling, name)
        _demand(lowest <= value <= highest, name, value)
    if sampling.logprobs is not None:
        _demand(0 <= sampling.logprobs <= MAX_LOGPROBS, "top_logprobs", sampling.logprobs)
    _demand(len(sampling.logit_bias) <= MAX_BIASES, "logit_bias", f"for {len(sampling.logit_bias)} tokens")
    for token, bias in sampling.logit_bias:
        _demand(0 <= token < vocab_size, "logit_bias", f"for token {token}, the vocabulary has {vocab_size}")
        _demand(-100 <= bias <= 100 or bias == -math.inf, "logit_bias", f"{bias} for token {token}")


def _demand(is_right: bool, name: str, value: object) -> None:
    if not is_right:
        raise RequestError(f"{name} cannot be {value}", param=name)
