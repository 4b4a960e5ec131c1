"""`GET /metrics` for Prometheus and `GET /nodes` for `prima ps`: what the head tells about itself, read when asked for.

Nothing is counted here; no token passes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from prima_core.node.driver import State
from prima_core.node.view import BOUNDS_S, Histogram, RequestTotals, ServerView

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Viewed(Protocol):
    """What can be looked at: see `prima_core.node.head.Head`."""

    @property
    def totals(self) -> RequestTotals: ...
    def view(self) -> ServerView: ...


def routes(viewed: Viewed) -> list[Route]:
    async def metrics(request: HttpRequest) -> Response:
        body, content_type = exposition(viewed.view(), viewed.totals, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def nodes(request: HttpRequest) -> Response:
        return Response(msgspec.json.encode(viewed.view()), media_type="application/json")

    return [Route("/metrics", metrics), Route("/nodes", nodes)]


def exposition(view: ServerView, totals: RequestTotals, accept: str) -> tuple[bytes, str]:
    """The metrics in the text format that the asker accepts, and its content type."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    class Collected(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from _server_metrics(view)
            yield from _request_metrics(totals)
            yield from _node_metrics(view)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected())
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it compares versions, also those that are no numbers
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


def _server_metrics(view: ServerView) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily("prima_build", "What is served.", {"version": view.version, "model": view.model})
    for name, help_, value in (
        ("serving", "1 while requests are served.", view.state is State.SERVING),
        ("requests_running", "Requests that are computed now.", view.n_running),
        ("requests_waiting", "Requests in the queue.", view.n_waiting),
        ("kv_tokens_used", "KV positions that are reserved for running requests.", view.kv_tokens_used),
        ("kv_tokens", "KV positions that the plan has room for.", view.kv_tokens),
    ):
        yield GaugeMetricFamily(f"prima_{name}", help_, float(value))


def _request_metrics(totals: RequestTotals) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    requests = CounterMetricFamily("prima_requests", "Requests that have ended, by outcome.", labels=["outcome"])
    for outcome, count in totals.outcomes.items():
        requests.add_metric([outcome], count)
    yield requests
    for name, help_, value in (
        ("prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
        ("cached_tokens", "Tokens of prompts that were not computed again.", totals.cached_tokens),
        ("generated_tokens", "Tokens that were generated.", totals.generated_tokens),
    ):
        yield CounterMetricFamily(f"prima_{name}", help_, value)
    for name, help_, histogram in (
        ("time_to_first_token_seconds", "From submitting a request to its first token.", totals.ttft_s),
        ("time_per_output_token_seconds", "Per further token of a request, on average.", totals.tpot_s),
    ):
        yield HistogramMetricFamily(f"prima_{name}", help_, _buckets(histogram), histogram.total)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus counts upwards: each group with all below it."""
    return list(zip((*map(str, BOUNDS_S), "+Inf"), map(float, accumulate(histogram.counts)), strict=True))


def _node_metrics(view: ServerView) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    seconds = CounterMetricFamily(
        "prima_node_seconds", "How a node's owner thread spent its time.", labels=["node", "activity"]
    )
    uptime = CounterMetricFamily("prima_node_uptime_seconds", "Since a node was started.", labels=["node"])
    layers = GaugeMetricFamily("prima_node_layers", "Layers that a node computes.", labels=["node"])
    memory = GaugeMetricFamily("prima_node_memory_bytes", "Memory that a node offers.", labels=["node"])
    weights = GaugeMetricFamily(
        "prima_node_weight_bytes",
        "Weights that stay in memory, come from disk, and their buffer.",
        labels=["node", "kind"],
    )
    for node in view.nodes:
        times = node.times
        for activity in ("compute", "stall", "wait", "disk", "link"):
            seconds.add_metric([node.name, activity], getattr(times, f"{activity}_s"))
        uptime.add_metric([node.name], times.uptime_s)
        layers.add_metric([node.name], sum(map(len, node.layers)))
        memory.add_metric([node.name], node.memory_bytes)
        for kind in ("pinned", "streamed", "buffer"):
            weights.add_metric([node.name, kind], getattr(times, f"{kind}_bytes"))
    yield from (seconds, uptime, layers, memory, weights)
    for name, field, help_ in (
        ("steps", "n_steps", "Steps that went through a node's layers."),
        ("tokens", "n_tokens", "Tokens that went through a node's layers."),
        ("sent_bytes", "sent_bytes", "Bytes that a node sent to other nodes."),
        ("read_bytes", "read_bytes", "Bytes of weights that a node read from disk after they were loaded."),
        ("expert_hits", "expert_hits", "Experts that were in memory when steps chose them, of those read on demand."),
        ("expert_misses", "expert_misses", "Experts that had to be read from disk when steps chose them."),
    ):
        family = CounterMetricFamily(f"prima_node_{name}", help_, labels=["node"])
        for node in view.nodes:
            family.add_metric([node.name], getattr(node.times, field))
        yield family
