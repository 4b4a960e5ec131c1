"""A cluster on this machine and for one model: what each node gets, and its command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prima_core.cage.amounts import CORES, DISK_RATE, LINK_RATE, SIZE, Kind, parse
from prima_core.cage.cluster import PLACEHOLDER, Cluster, Node
from prima_core.errors import ConfigError

LEAST_LIMIT_BYTES = 48 * 2**20
"""Less than the interpreter of a node needs to start."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What shares are of: the model's bytes, the disk's bytes/s (None: not measured), the machine's cores."""

    model_bytes: int
    disk_bytes_s: float | None
    n_cores: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node gets. `memory_bytes` is the limit of its whole cage, `budget_bytes` of that is for a model."""

    memory_bytes: int
    budget_bytes: int
    cores: float | None
    period_us: int
    disk_bytes_s: int | None
    link_bits_s: int | None
    delay_s: float


def wants_disk_rate(cluster: Cluster) -> bool:
    """Whether some rate is a share of the disk's."""
    return any(node.disk is not None and parse(node.disk, DISK_RATE).share for node in cluster.nodes)


def limits_of(node: Node, machine: Machine) -> Limits:
    """Raises ConfigError for figures that no process can live with."""
    budget = sum(parse(size, SIZE).of(machine.model_bytes) for size in (node.memory, node.vram))
    limit = budget + parse(node.base, SIZE).of(machine.model_bytes)
    if budget < 1 or limit < LEAST_LIMIT_BYTES:
        raise ConfigError(
            f"node {node.name} would have {limit / 1e6:,.0f} MB, {budget / 1e6:,.0f} MB of it for the model:"
            " no process lives there",
            hint="give it more memory or base, or take a larger model",
        )
    return Limits(
        memory_bytes=int(limit),
        budget_bytes=int(budget),
        cores=_rate(node, "cores", CORES, machine.n_cores, 0.01),
        period_us=int(node.period_ms * 1000),
        disk_bytes_s=_whole(_rate(node, "disk", DISK_RATE, machine.disk_bytes_s or 0, 4096)),
        link_bits_s=_whole(_rate(node, "link", LINK_RATE, 0, 8000)),
        delay_s=node.delay_ms / 1000,
    )


def _rate(node: Node, field: str, kind: Kind, reference: float, least: float) -> float | None:
    text = getattr(node, field)
    rate = None if text is None else parse(text, kind).of(reference)
    if rate is not None and not least <= rate < math.inf:
        raise ConfigError(f"node {node.name}: {field} comes to {rate:g}", hint=f"give it {least:g} at least")
    return rate


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands: `rank` of all, the head's is 0; an address for each."""

    rank: int
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        return self.addresses[self.rank]

    @property
    def next(self) -> str:
        return self.addresses[(self.rank + 1) % len(self.addresses)]

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(address for rank, address in enumerate(self.addresses) if rank != self.rank)


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of the prompt, and tokens to generate."""

    n_prompt: int
    n_gen: int


def filled(node: Node, place: Place, limits: Limits, model: Path, work: Workload) -> list[str]:
    """The node's own command with its placeholders filled in."""
    values: Mapping[str, object] = {
        "model": model,
        "name": node.name,
        "rank": place.rank,
        "world": len(place.addresses),
        "address": place.address,
        "head": place.addresses[0],
        "next": place.next,
        "peers": ",".join(place.peers),
        "threads": node.threads,
        "memory": limits.budget_bytes,
        "prompt": work.n_prompt,
        "gen": work.n_gen,
    }
    return [PLACEHOLDER.sub(lambda match: str(values[match[1]]), part) for part in node.command]
