"""What a measurement of an emulated cluster found: plain data, the JSON of `prima bench --cluster`, and a table."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prima_core.plan.forecast import NodeForecast


class NodeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `limit_bytes` is what its cage holds, `budget_bytes` what of that is for the model; `peak_bytes` counts
    cached pages too, `rss_bytes` what its processes had mapped. `pressure`: the drop of the memory that was available
    in the cage, as a share of it, and how much of that is more than the plan's `planned_bytes`. `told_per_token`: what
    a node of prima's says it did, as `NodeTimes` calls it; `forecast`: what the plan foretold of that.
    """

    name: str
    limit_bytes: int
    budget_bytes: int
    read_bytes_per_token: float
    peak_bytes: int
    rss_bytes: int
    pressure: float
    planned_bytes: int | None
    pressure_beyond_plan: float | None
    told_per_token: dict[str, float]
    forecast: NodeForecast | None = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first token, and per further token, of which the first are left out: `n_tokens` counted.

    `disk_bytes_s`: of this machine by direct reads, where the cluster's disks are shares of it. None: not measured.
    `forecast_s`: per further token, as prima's plan foretold it from what the nodes had measured of themselves.
    """

    cluster: str
    model: str
    model_bytes: int
    disk_bytes_s: float | None
    n_prompt: int
    n_tokens: int
    ttft_s: float | None
    tpot_s: float
    prefill_read_bytes: int | None
    nodes: tuple[NodeFigures, ...]
    forecast_s: float | None = None

    @property
    def read_bytes_per_token(self) -> float:
        return sum(node.read_bytes_per_token for node in self.nodes)


def to_json(figures: Figures) -> bytes:
    sums = {"read_bytes_per_token": figures.read_bytes_per_token}
    return msgspec.json.encode({**msgspec.to_builtins(figures), **sums})


def shown(figures: Figures) -> RenderableType:
    activities = tuple(
        dict.fromkeys(name for node in figures.nodes for name in node.told_per_token if name[-2:] == "_s")
    )
    heads = (f"{name.removesuffix('_s')}/token" for name in activities)
    foretold = figures.forecast_s is not None
    columns = ("foretold", *heads) if foretold else heads
    table = Table("node", "limit", "peak", "RSS", "pressure", "beyond plan", "read/token", *columns)
    for node in figures.nodes:
        told = (_ms(node.told_per_token.get(name)) for name in activities)
        table.add_row(*map(Text, (*_facts(node), *((_foretold(node.forecast),) if foretold else ()), *told)))
    return Group(*map(Text, _lines(figures)), table)


def _lines(figures: Figures) -> Iterator[str]:
    yield f"{figures.cluster}: {figures.model}, {figures.model_bytes / 1e9:.2f} GB"
    if figures.disk_bytes_s is not None:
        yield f"disk: {figures.disk_bytes_s / 1e9:.2f} GB/s by direct reads"
    if figures.ttft_s is not None:
        read = f", {figures.prefill_read_bytes / 1e9:.2f} GB read" if figures.prefill_read_bytes is not None else ""
        yield f"first token after {figures.ttft_s:.3f} s ({figures.n_prompt} tokens of prompt{read})"
    yield (
        f"{figures.tpot_s * 1000:,.1f} ms per token ({1 / figures.tpot_s:.3g} tokens/s, over {figures.n_tokens}),"
        f" {figures.read_bytes_per_token / 1e9:.3f} GB read per token"
    )
    if figures.forecast_s is not None:
        ratio = figures.tpot_s / figures.forecast_s
        yield f"foretold: {figures.forecast_s * 1000:,.1f} ms per token, {ratio:.2f} times that were measured"


def _facts(node: NodeFigures) -> tuple[str, ...]:
    sizes = (_mb(size) for size in (node.limit_bytes, node.peak_bytes, node.rss_bytes))
    beyond = "-" if node.pressure_beyond_plan is None else f"{node.pressure_beyond_plan:.1%}"
    return node.name, *sizes, f"{node.pressure:.1%}", beyond, _mb(node.read_bytes_per_token)


def _foretold(node: NodeForecast | None) -> str:
    if node is None:
        return "-"
    return f"{_mb(node.read_bytes)}, {_ms(node.compute_s)} compute, {_ms(node.stall_s)} stall"


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.2f} ms"
