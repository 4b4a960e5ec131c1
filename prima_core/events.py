"""What `prima_on_event` listeners are told: facts after they happened, never per token, never text or token ids.

A listener gets every kind, also kinds that later versions add: match the ones you know and ignore the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prima_core.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node was let into the cluster. `memory_bytes` is what it offers for weights and KV."""

    node: str
    memory_bytes: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node left, died or went silent; `reason` is a sentence for an operator."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanMade:
    """All nodes of a checked plan are ready; steps run by it from now on. `epoch` counts the plans of this run."""

    epoch: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class ServerReady:
    """The HTTP server answers at `url`."""

    url: str
    model: str


@dataclass(frozen=True, slots=True)
class RequestDone:
    """A request ended. `finish_reason` as in the API (`stop`, `length`, ...), or `cancelled`, or `error`.

    `n_cached_tokens` of its prompt were not computed again."""

    request_id: str
    n_prompt_tokens: int
    n_generated_tokens: int
    finish_reason: str
    first_token_s: float
    total_s: float
    n_cached_tokens: int = 0


Event = NodeJoined | NodeLost | PlanMade | ServerReady | RequestDone
