"""What a head tells about itself and its cluster to whoever looks: plain data, the JSON of `GET /nodes`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prima_core.events import RequestDone
from prima_core.interfaces import Layers
from prima_core.node.coordinate import links_of
from prima_core.node.driver import State, Status
from prima_core.node.member import Member
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan
from prima_core.plan.problem import DeviceFacts
from prima_core.ring.times import NodeTimes

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of a histogram's groups: from a token of a small model to a long prompt on a small machine."""


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of a node, and what the plan lays on it: of `weight_bytes` are `streamed_bytes` read in every pass."""

    id: str
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    layers: tuple[Layers, ...]
    streamed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node. `memory_bytes` is what it offers, `weight_bytes` and `kv_bytes` what the plan takes of that; devices
    that share the host's memory share what of it the node may use.

    `loaded`: the share of its weights that is in memory, while it loads. `off`: what it does otherwise than was
    measured or foretold, by more than a quarter, in words. `has_output`: it computes the output part."""

    name: str
    is_head: bool
    devices: tuple[DeviceView, ...]
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    layers: tuple[Layers, ...]
    loaded: float | None
    times: NodeTimes
    off: tuple[str, ...] = ()
    has_output: bool = False


@dataclass(frozen=True, slots=True)
class LinkView:
    """A way between two nodes, as measured when the later of them joined, or since: see `LinkFacts`."""

    source: str
    target: str
    latency_s: float
    bytes_s: float


@dataclass(frozen=True, slots=True)
class ServerView:
    """A head and its nodes. `kv_tokens_used` of `kv_tokens` positions are reserved for the requests that run.

    `forecast`: of the plan that is followed, where it can be foretold. `token_s`: seconds for each further token of the
    last request that had any; 0: there was none. `summary`: who does what, and who was left out, in words."""

    model: str
    version: str
    state: State
    reason: str
    context_length: int
    n_running: int
    n_waiting: int
    kv_tokens_used: int
    kv_tokens: int
    nodes: tuple[NodeView, ...]
    forecast: Forecast | None = None
    token_s: float = 0.0
    summary: str = ""
    links: tuple[LinkView, ...] = ()


def link_views(members: Sequence[Member]) -> tuple[LinkView, ...]:
    """Of the links that were measured."""
    known = sorted(
        (link.source, link.target, link.latency_s, link.bytes_s) for link in links_of(members) if link.source
    )
    return tuple(LinkView(*link) for link in known)


def node_view(member: Member, head: str, status: Status, times: NodeTimes, off: tuple[str, ...] = ()) -> NodeView:
    plan = status.plan
    devices = tuple(_device_view(member, device, plan) for device in member.devices)
    return NodeView(
        name=member.name,
        is_head=member.name == head,
        devices=devices,
        memory_bytes=member.facts.room_bytes,
        weight_bytes=sum(device.weight_bytes for device in devices),
        kv_bytes=sum(device.kv_bytes for device in devices),
        layers=plan.layers_of(member.name) if plan is not None else (),
        loaded=status.progress.get(member.name),
        times=times,
        off=off,
        has_output=plan is not None and plan.output_node == member.name,
    )


def own_rate(member: Member, members: Iterable[Member]) -> float:
    """What a node can read in a second while all that share its disk read too."""
    return member.disk_bytes_s / max(1, sum(bool(other.disk) and other.disk == member.disk for other in members))


def _device_view(member: Member, device: DeviceFacts, plan: Plan | None) -> DeviceView:
    if plan is None:
        return DeviceView(device.id, device.memory_bytes, 0, 0, ())
    needs = [need for need in plan.residency if (need.node, need.device) == (member.name, device.id)]
    visits = (visit for visit in plan.visits if visit.node == member.name)
    parts = (part for visit in visits for part in visit.parts(member.devices[0].id))
    return DeviceView(
        id=device.id,
        memory_bytes=device.memory_bytes,
        weight_bytes=sum(need.weight_bytes for need in needs),
        kv_bytes=sum(need.kv_bytes for need in needs),
        layers=tuple(part.layers for part in parts if part.device == device.id),
        streamed_bytes=sum(need.disk_bytes for need in needs),
    )


# ---------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each group: up to and with each of `BOUNDS_S`, and above the last."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    total: float = 0.0

    def plus(self, value: float) -> Histogram:
        at = bisect_left(BOUNDS_S, value)
        counts = (*self.counts[:at], self.counts[at] + 1, *self.counts[at + 1 :])
        return Histogram(counts, self.total + value)


@dataclass(frozen=True, slots=True)
class RequestTotals:
    """All requests that have ended since the start, by outcome (`RequestDone.finish_reason`), and their tokens.

    `ttft_s`: seconds from submitting to the first token; `tpot_s`: from the first to the end, for each further token.
    """

    outcomes: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)

    def plus(self, done: RequestDone) -> RequestTotals:
        n, reason = done.n_generated_tokens, done.finish_reason
        tpot_s = token_s(done)
        return replace(
            self,
            outcomes={**self.outcomes, reason: self.outcomes.get(reason, 0) + 1},
            prompt_tokens=self.prompt_tokens + done.n_prompt_tokens,
            cached_tokens=self.cached_tokens + done.n_cached_tokens,
            generated_tokens=self.generated_tokens + n,
            ttft_s=self.ttft_s.plus(done.first_token_s) if n else self.ttft_s,
            tpot_s=self.tpot_s if tpot_s is None else self.tpot_s.plus(tpot_s),
        )


def token_s(done: RequestDone) -> float | None:
    """Seconds for each token after the first."""
    n = done.n_generated_tokens
    return (done.total_s - done.first_token_s) / (n - 1) if n > 1 else None
