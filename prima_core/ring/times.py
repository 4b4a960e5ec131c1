"""How a node's owner thread spends its time: sums since the node started, which only grow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """Crosses the control plane, where the bounds are checked (NaN keeps none).

    `uptime_s`: since the node started; what is left of it beside the others the owner thread was idle.
    `compute_s`: embeddings, layers, logits, and drawing tokens.
    `wait_s`: nothing to do here while a request was running, because other nodes or links were at work. On the head: a
    step was in flight. Elsewhere: until a frame came that goes on with a sequence that had begun before.
    `disk_s`: bringing weights into memory when a part of the model is loaded.
    `link_s`: encoding and decoding frames, and handing them to the transport; not their time on the wire.
    `n_steps`, `n_tokens`: what went through this node's layers, a step once also where it visits the node again.
    `sent_bytes`: frames to other nodes.
    """

    uptime_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    wait_s: Seconds = 0.0
    disk_s: Seconds = 0.0
    link_s: Seconds = 0.0
    n_steps: Count = 0
    n_tokens: Count = 0
    sent_bytes: Count = 0


class Meter:
    """Sums NodeTimes up: a few additions per step. The owner thread writes; `decode_s` is the receive thread's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.compute_s = self.wait_s = self.disk_s = self.send_s = self.decode_s = 0.0
        self.n_steps = self.n_tokens = self.sent_bytes = 0

    def computed_since(self, start: float) -> None:
        """`start` is of `time.perf_counter`."""
        self.compute_s += time.perf_counter() - start

    def times(self) -> NodeTimes:
        """From any thread; the sums may be of moments a step apart."""
        return NodeTimes(
            time.perf_counter() - self._start,
            self.compute_s,
            self.wait_s,
            self.disk_s,
            self.send_s + self.decode_s,
            self.n_steps,
            self.n_tokens,
            self.sent_bytes,
        )
