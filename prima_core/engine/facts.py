"""What the engine is doing, as immutable facts that any thread may read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """A running request. `n_computed` of its `capacity` KV positions are in use; `n_cached` of its prompt's were there
    already; `n_shifted` tokens were forgotten because the context was full."""

    number: int
    is_prefilling: bool
    n_prompt: int
    n_generated: int
    n_cached: int
    n_computed: int
    n_shifted: int
    capacity: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Requests, and KV positions of the `kv_tokens` that the plan has room for: `kv_running` are reserved by running
    requests, `kv_kept` hold `n_kept` ended sequences that a later prompt may begin with."""

    running: tuple[SequenceFacts, ...] = ()
    n_waiting: int = 0
    n_kept: int = 0
    kv_tokens: int = 0
    kv_running: int = 0
    kv_kept: int = 0
    max_sequences: int = 0
