"""The owner of the machine comes first: what a node keeps pinned follows what other programs leave.

Pinned weights are clean pages of a file. When another program takes memory, the kernel takes such pages back, from us
and from everybody's cached files, and each pass then faults ours in again in small pieces: it thrashes. So a node gives
pinned weights up before that, streams them instead, and takes them again when there has been room for a while.
KV and the process itself stay as they are; where the buffer has to grow for what is streamed, as much more is given up.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from prima_core.errors import PrimaError
from prima_core.memory.reader import JOIN_S
from prima_core.memory.system import Memory

log = logging.getLogger(__name__)

_MB, _GB = 10**6, 10**9

PROCESS_BYTES = 150 * _MB
"""What a node takes beside weights, KV and buffer: interpreter, libraries, activations."""
LOOK_EVERY_S = 0.25
COUNT_LOST_EVERY_S = 2.0
"""To ask for the state of every page of some GB takes milliseconds."""
GROW_EVERY_S = 1.0
QUIET_S = 5.0
MAX_PATIENCE_S = 300.0
MIN_STEP_BYTES, MAX_STEP_BYTES = 64 * _MB, 256 * _MB
"""Taken back at once: it comes from the disk, which passes need too, and others may ask for it meanwhile."""
PRESSED = 0.1
"""From this share of time on in which processes wait for memory, twice the reserve is left to them."""


def room_bytes(memory: Memory, n_nodes: int = 1) -> int:
    """What each of `n_nodes` that start now may take for weights, KV and buffer, so that others have the reserve."""
    return max(0, (memory.free_bytes - memory.mapped_bytes) // n_nodes - PROCESS_BYTES)


# ---------------------------------------------------------------- the decision


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen at a moment. `pinned_bytes`: what is held; of that `lost_bytes` are what the system took back, and
    `copied_bytes` no pages of the file. `pressure`: share of time in which processes wait for memory."""

    memory: Memory
    pinned_bytes: int
    lost_bytes: int = 0
    copied_bytes: int = 0
    pressure: float = 0.0

    @property
    def left_bytes(self) -> int:
        """What others have when all that is pinned is in memory. What is mapped counts as taken, for somebody uses it:
        other nodes' weights, programs that run."""
        return self.memory.available_bytes - max(self.pinned_bytes - self.copied_bytes, self.memory.mapped_bytes)

    @property
    def lacking_bytes(self) -> int:
        """What others lack of the reserve. Pages of ours that are gone were lacking too: somebody reads files again and
        again, or a group around ours has a limit. A few go always."""
        kept = self.memory.reserve_bytes * (2 if self.pressure >= PRESSED else 1)
        few = max(16 * _MB, self.pinned_bytes // 100)
        return max(0, kept - self.left_bytes, self.lost_bytes if self.lost_bytes > few else 0)


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered. `wanted_bytes` may be more than is held, as tensors stay whole. The times are those of the
    last look at which memory was lacking, and of the last step back."""

    wanted_bytes: int
    available_bytes: int = 0
    lacked_s: float = -math.inf
    grown_s: float = -math.inf
    patience_s: float = QUIET_S


def decide(planned_bytes: int, state: State, sight: Sight, now_s: float) -> State:
    """The next state, whose `wanted_bytes`, from 0 to what the plan pins, are to be pinned."""
    decided = _shrink(state, sight, now_s) if sight.lacking_bytes else _grow(planned_bytes, state, sight, now_s)
    return replace(decided, available_bytes=sight.memory.available_bytes)


def _shrink(state: State, sight: Sight, now_s: float) -> State:
    """Give up at once what is lacking, with a margin, and more where others took much since the last look: as much
    again must be there for them."""
    fall = state.available_bytes - sight.memory.available_bytes
    given = max(sight.lacking_bytes + _margin(sight), fall - sight.left_bytes)
    return replace(
        state,
        wanted_bytes=max(0, min(state.wanted_bytes, sight.pinned_bytes - given)),
        lacked_s=now_s,
        patience_s=_patience(state, now_s),
    )


def _patience(state: State, now_s: float) -> float:
    """How long nothing may lack before a step back. Who asks again right after one is waited for longer and longer."""
    if state.grown_s < state.lacked_s:
        return state.patience_s  # the shortage goes on
    return min(2 * state.patience_s, MAX_PATIENCE_S) if now_s - state.grown_s < 2 * state.patience_s else QUIET_S


def _grow(planned_bytes: int, state: State, sight: Sight, now_s: float) -> State:
    """A step back towards the plan, if that is due and leaves more than what would be given up again."""
    if now_s - state.lacked_s < state.patience_s or now_s - state.grown_s < GROW_EVERY_S:
        return state
    to_come = max(0, state.wanted_bytes - sight.pinned_bytes)
    slack = sight.left_bytes - to_come - sight.memory.reserve_bytes - 2 * _margin(sight)
    step = min(planned_bytes - state.wanted_bytes, slack, max(planned_bytes // 16, MIN_STEP_BYTES), MAX_STEP_BYTES)
    if step <= 0 or sight.pressure >= PRESSED:
        return state
    return replace(state, wanted_bytes=state.wanted_bytes + step, grown_s=now_s)


def _margin(sight: Sight) -> int:
    return sight.memory.reserve_bytes // 4


# ---------------------------------------------------------------- the loop


class Gauges(Protocol):
    """What the governor needs of a `System`."""

    def memory(self) -> Memory: ...

    def pressure(self) -> float | None: ...


class Pinning(Protocol):
    """What the governor needs of a store."""

    @property
    def pinned_bytes(self) -> int:
        """What is held."""
        ...

    @property
    def copied_bytes(self) -> int:
        """Of that, what a device has copied into memory of the host: it is not available."""
        ...

    def resize(self, pinned_bytes: int) -> None:
        """Hold at most so much, from any thread. Raises OSError, PrimaError."""
        ...

    def lost_bytes(self) -> int | None:
        """How much of what is held is not in memory; None: not known."""
        ...


class InTwoMemories(Pinning, Protocol):
    @property
    def device_bytes(self) -> int:
        """Of what is held, what a device has in a memory of its own, for good."""
        ...


@dataclass(frozen=True, slots=True)
class HostPart:
    """What of a store is in the host's memory, where a device has the rest in its own."""

    store: InTwoMemories

    @property
    def pinned_bytes(self) -> int:
        return self.store.pinned_bytes - self.store.device_bytes

    @property
    def copied_bytes(self) -> int:
        """Copies are the device's."""
        return 0

    def resize(self, pinned_bytes: int) -> None:
        self.store.resize(pinned_bytes + self.store.device_bytes)

    def lost_bytes(self) -> int | None:
        return self.store.lost_bytes()


class Governor:
    """Looks some times a second, in a thread of its own, and resizes the store. Who starts it closes it, before the
    store. `planned_bytes`: what the plan pins."""

    def __init__(
        self, store: Pinning, system: Gauges, planned_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.planned_bytes = planned_bytes
        self._store = store
        self._system = system
        self._clock = clock
        self._state = State(planned_bytes)
        self._counted_s = -math.inf
        self._is_short = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prima-governor", daemon=True)

    @property
    def pinned_bytes(self) -> int:
        """What is held now."""
        return self._store.pinned_bytes

    def start(self) -> None:
        """Where the plan pins nothing there is nothing to look after, and no thread."""
        if self.planned_bytes:
            self._thread.start()

    def close(self) -> None:
        """Returns when the store is left alone, or the last step takes long: it ends when the store is closed.
        Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def look(self) -> None:
        """See, decide, act. Raises OSError, PrimaError."""
        now_s = self._clock()
        sight = self._see(now_s)
        before, self._state = self._state.wanted_bytes, decide(self.planned_bytes, self._state, sight, now_s)
        wanted = self._state.wanted_bytes
        self._tell(before, wanted, sight)
        if wanted != before or sight.pinned_bytes > wanted:
            try:
                self._store.resize(wanted)
            except BaseException:  # what did not come is a step to take yet
                self._state = replace(self._state, wanted_bytes=min(before, wanted))
                raise

    def _see(self, now_s: float) -> Sight:
        lost = 0
        if now_s - self._counted_s >= COUNT_LOST_EVERY_S:
            self._counted_s = now_s
            lost = self._store.lost_bytes() or 0
        pressure = self._system.pressure() or 0.0
        return Sight(self._system.memory(), self._store.pinned_bytes, lost, self._store.copied_bytes, pressure)

    def _tell(self, before: int, wanted: int, sight: Sight) -> None:
        planned = self.planned_bytes
        if wanted < before:
            text = (
                "others need memory, %.2f GB are left: %.2f GB of weights stay in it, %.2f GB more are read each pass"
            )
            log.info(text, sight.left_bytes / _GB, wanted / _GB, (planned - wanted) / _GB)
        elif before < wanted == planned:
            log.info("others have memory again: %.2f GB of weights stay in it, as planned", planned / _GB)
        was_short, self._is_short = self._is_short, sight.lacking_bytes > 0 and not before
        if self._is_short and not was_short:
            text = "others still lack %.2f GB, and no more weights can leave memory: end a program, or this node"
            log.warning(text, sight.lacking_bytes / _GB)

    def _main(self) -> None:
        told = ""
        while not self._stopping.wait(LOOK_EVERY_S):
            try:
                self.look()
                told = ""
            except (OSError, PrimaError) as error:  # the next look tries again
                if str(error) != told:
                    told = str(error)
                    log.warning("what weights stay in memory cannot follow what others leave: %s", error)
