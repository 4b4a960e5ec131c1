"""The plan that is followed now, and how far its nodes are with loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prima_core.errors import ClusterError
from prima_core.node.member import Member
from prima_core.plan.plan import Plan
from prima_core.ring.wire import Epoch

LOAD_STALLS_AFTER_S = 300.0
"""A node that loads and has not come further for so long is left out. The slowest disks read the hundredth part of a
model, which is told, in less; and so long a device may take to compile its kernels."""


@dataclass(slots=True)
class Running:
    """The epoch that is loading (`pending` nodes are not ready yet) or serving. `members` as they were planned with.
    `progress`: the loaded share of each node that still loads. `before`: what served till now, where this was begun
    only because it is better, until it serves too."""

    epoch: Epoch
    plan: Plan
    pending: set[str]
    members: Mapping[str, Member]
    began_s: float
    progress: dict[str, float] = field(default_factory=dict)
    before: Running | None = None
    _moved_s: dict[str, float] = field(default_factory=dict)  # when each of them last came further

    def loads(self, name: str, share: float, now_s: float) -> None:
        if share != self.progress.get(name):
            self._moved_s[name] = now_s
        self.progress[name] = share

    def is_ready(self, name: str) -> None:
        self.pending.discard(name)
        self.progress.pop(name, None)
        if not self.pending:
            self.before = None

    def stalled(self, now_s: float) -> tuple[str, ClusterError] | None:
        """A node that does not come further, and how to say so."""
        moved_s = {name: self._moved_s.get(name, self.began_s) for name in sorted(self.pending)}
        slowest = min(moved_s, key=lambda name: moved_s[name], default=None)
        if slowest is None or now_s - moved_s[slowest] <= LOAD_STALLS_AFTER_S:
            return None
        said = f"it has not loaded more than {self.progress.get(slowest, 0.0):.0%} of its part"
        hint = "look at its disk and its log, then start it again"
        return slowest, ClusterError(f"{said} for {LOAD_STALLS_AFTER_S:.0f} s", hint=hint)
