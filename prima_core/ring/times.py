"""How a node's owner thread spends its time: sums since the node started, which only grow."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """Crosses the control plane, where the bounds are checked (NaN keeps none).

    `uptime_s`: since the node started; what is left of it beside the others the owner thread was idle.
    `compute_s`: embeddings, layers, logits, and drawing tokens, without `stall_s`.
    `stall_s`: waiting for weights that come from disk in every pass.
    `wait_s`: nothing to do here while a request was running, because other nodes or links were at work. On the head: a
    step was in flight. Elsewhere: until a frame came that goes on with a sequence that had begun before.
    `disk_s`: bringing weights into memory when a part of the model is loaded.
    `link_s`: encoding and decoding frames, and handing them to the transport; not their time on the wire.
    `n_steps`, `n_tokens`: what went through this node's layers, a step once also where it visits the node again.
    `sent_bytes`: frames to other nodes. `read_bytes`: weights read from disk since they were loaded, in `reading_s`
    seconds in which at least one read was under way. `expert_hits`, `expert_misses`: experts that steps chose, of those
    that are read when they are chosen, and that were in memory or not; each once in a step and layer.

    No sums, but what is so now: `pinned_bytes` of weights stay in memory, `streamed_bytes` are read in every pass,
    through a buffer of `buffer_bytes`.
    """

    uptime_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    wait_s: Seconds = 0.0
    disk_s: Seconds = 0.0
    link_s: Seconds = 0.0
    n_steps: Count = 0
    n_tokens: Count = 0
    sent_bytes: Count = 0
    stall_s: Seconds = 0.0
    read_bytes: Count = 0
    reading_s: Seconds = 0.0
    pinned_bytes: Count = 0
    streamed_bytes: Count = 0
    buffer_bytes: Count = 0
    expert_hits: Count = 0
    expert_misses: Count = 0

    @property
    def expert_hit_rate(self) -> float | None:
        """None where no experts were chosen that are read then."""
        n_chosen = self.expert_hits + self.expert_misses
        return self.expert_hits / n_chosen if n_chosen else None


class Reads(Protocol):
    """What a store has read since it was opened, and what it holds now: see `memory.store.StoreStats`."""

    @property
    def read_bytes(self) -> int: ...
    @property
    def reading_s(self) -> float: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def pinned_bytes(self) -> int: ...
    @property
    def streamed_bytes(self) -> int: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def expert_hits(self) -> int: ...
    @property
    def expert_misses(self) -> int: ...


class Reader(Protocol):
    def stats(self) -> Reads:
        """From any thread."""
        ...


@dataclass(frozen=True, slots=True)
class _Source:
    """What weights are read from now, and what was read and waited for before it."""

    reader: Reader | None = None
    read_bytes: int = 0
    reading_s: float = 0.0
    stall_s: float = 0.0
    expert_hits: int = 0
    expert_misses: int = 0

    def sums(self) -> _Source:
        """With what is read from now, and without a reader."""
        if self.reader is None:
            return self
        now = self.reader.stats()
        return _Source(
            None,
            self.read_bytes + now.read_bytes,
            self.reading_s + now.reading_s,
            self.stall_s + now.stall_s,
            self.expert_hits + now.expert_hits,
            self.expert_misses + now.expert_misses,
        )


class Meter:
    """Sums NodeTimes up: a few additions per step. The owner thread writes; `decode_s` is the receive thread's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._source = _Source()
        self.compute_s = self.wait_s = self.disk_s = self.send_s = self.decode_s = 0.0
        self.n_steps = self.n_tokens = self.sent_bytes = 0

    def begin(self) -> float:
        """The time, on a clock that stands still while weights are waited for: for `computed_since`."""
        return time.perf_counter() - self._stall_s()

    def computed_since(self, start: float) -> None:
        """`start` is of `begin`."""
        self.compute_s += self.begin() - start

    def read_from(self, reader: Reader | None) -> None:
        """Another store is in use from now on, or none; that before it has still to be there."""
        self._source = replace(self._source.sums(), reader=reader)  # at once: others read it meanwhile

    def times(self) -> NodeTimes:
        """From any thread; the sums may be of moments a step apart."""
        source = self._source
        sums, now = source.sums(), None if source.reader is None else source.reader.stats()
        return NodeTimes(
            time.perf_counter() - self._start,
            max(0.0, self.compute_s),  # clocks of some systems are coarse
            self.wait_s,
            self.disk_s,
            self.send_s + self.decode_s,
            self.n_steps,
            self.n_tokens,
            self.sent_bytes,
            sums.stall_s,
            sums.read_bytes,
            sums.reading_s,
            now.pinned_bytes if now else 0,
            now.streamed_bytes if now else 0,
            now.buffer_bytes if now else 0,
            sums.expert_hits,
            sums.expert_misses,
        )

    def _stall_s(self) -> float:
        reader = self._source.reader
        return 0.0 if reader is None else reader.stats().stall_s
