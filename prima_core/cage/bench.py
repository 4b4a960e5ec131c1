"""Measure an emulated cluster: start its nodes in a cage, time tokens, and count what each node read and took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from prima_core.cage.api import Api
from prima_core.cage.cage import Cage, Cell, model_files, opened
from prima_core.cage.cluster import Cluster
from prima_core.cage.command import PRIMA_URL, Settings, command_of, environment
from prima_core.cage.figures import Figures, NodeFigures
from prima_core.cage.limits import Workload
from prima_core.cage.program import Program
from prima_core.cage.watching import MemoryWatch
from prima_core.errors import ClusterError
from prima_core.node.driver import State
from prima_core.node.view import ServerView
from prima_core.plan.forecast import Forecast, NodeForecast
from prima_core.ring.membership import HEARTBEAT_S
from prima_core.ring.security import format_token, new_secret

READY_WITHIN_S = 900.0
STUCK_S = 3.0
RESULT_WITHIN_S = 3600.0
SKIPPED = 2
"""First tokens that do not count: the first is the prompt's, the second finds buffers as the prompt left them."""

STALE_S = 2 * HEARTBEAT_S
"""How old a worker's sums may be when the head tells them."""

COUNTED = ("n_steps", "n_tokens", "sent_bytes", "read_bytes")
"""Sums of NodeTimes beside seconds."""

WARM_UP = (5, 4)  # token ids that no measured prompt begins with, so that nothing of it is kept for that
_POLL_S = 0.1

Views = Mapping[str, Mapping[str, Any]]
"""Each node's NodeView as the head tells it, as JSON: nodes of a later version tell more. Empty for other systems."""


class Told(msgspec.Struct, frozen=True):
    """What of a ServerView is of use here."""

    nodes: tuple[dict[str, Any], ...] = ()  # Any: JSON
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Marks:
    """Where things stood at a moment. `read_bytes` by node."""

    at_s: float
    read_bytes: Mapping[str, int]
    views: Views
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of the parts of a measurement, and the marks between which `n_tokens` were made."""

    ttft_s: float | None
    tpot_s: float
    n_tokens: int
    prefill_read_bytes: int | None
    begin: Marks
    end: Marks


def bench_cluster(
    cluster: Cluster,
    model: Path,
    work: Workload,
    settings: Settings,
    tell: Callable[[str], None],
    when_idle: Callable[[], None] = lambda: None,
) -> Figures:
    """Raises PrimaError; whatever it made on this machine is gone when it returns, or is interrupted. `when_idle` is
    called right before and right after what is measured over an API, while nothing is asked of the nodes."""
    parts = model_files(model)
    with opened(cluster, parts) as cage:
        cage.make_cold()
        with MemoryWatch(cage.cells) as watch:
            bench = _Bench(cluster, cage, work, settings, tell, when_idle)
            timed = bench.run()
            nodes = tuple(_node_figures(cell, timed, watch) for cell in cage.cells)
            forecast = timed.end.forecast
        return Figures(
            cluster=cluster.name,
            model=model.name,
            model_bytes=cage.machine.model_bytes,
            disk_bytes_s=cage.machine.disk_bytes_s,
            n_prompt=work.n_prompt,
            n_tokens=timed.n_tokens,
            ttft_s=timed.ttft_s,
            tpot_s=timed.tpot_s,
            prefill_read_bytes=timed.prefill_read_bytes,
            nodes=nodes,
            forecast_s=None if forecast is None else forecast.token_s,
        )


class _Bench:
    def __init__(
        self,
        cluster: Cluster,
        cage: Cage,
        work: Workload,
        settings: Settings,
        tell: Callable[[str], None],
        when_idle: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._cage = cage
        self._work = work
        self._settings = settings
        self._tell = tell
        self._when_idle = when_idle
        self._env = environment(os.environ, format_token(new_secret()), cage.cache_folder)
        self._is_prima = not cluster.nodes[0].command

    def run(self) -> Timed:
        until_s = time.monotonic() + READY_WITHIN_S
        head, *others = self._cage.cells
        workers = [(cell, self._start(cell)) for cell in others]
        for cell, program in workers:
            _wait_until_ready(cell, program, until_s)
        program = self._start(head)
        _wait_until_ready(head, program, until_s)
        url = PRIMA_URL if self._is_prima else self._cluster.measure.url
        if not url:
            return self._printed(program, [program for _, program in workers])
        api = Api(head.namespace, url)
        self._wait_until_serving(api, until_s)
        return self._asked(api)

    def _start(self, cell: Cell) -> Program:
        return self._cage.start(cell, command_of(cell, self._settings, self._work), self._env)

    # ------------------------------------------------------------ over the API

    def _wait_until_serving(self, api: Api, until_s: float) -> None:
        self._tell(f"waiting until {self._cluster.name} serves ...")
        stuck_since_s: float | None = None
        while not api.is_ready():
            self._cage.check_alive()
            why = stuck(api, len(self._cage.cells)) if self._is_prima else None
            stuck_since_s = None if why is None else stuck_since_s or time.monotonic()
            if stuck_since_s is not None and time.monotonic() - stuck_since_s > STUCK_S:
                raise ClusterError(f"{self._cluster.name} does not serve: {why}")
            if time.monotonic() > until_s:
                raise ClusterError(f"{api.url} does not serve within {READY_WITHIN_S:g} s")
            time.sleep(_POLL_S)

    def _asked(self, api: Api) -> Timed:
        for _ in api.tokens(WARM_UP, 2):
            pass
        self._when_idle()
        self._tell(f"measuring {self._work.n_prompt} + {self._work.n_gen} tokens ...")
        first, begin, n_before, n_come, last_s = self._marks(api), None, 0, 0, 0.0
        ttft_s, prefill = 0.0, 0
        for last_s in api.tokens(prompt_ids(self._work.n_prompt), self._work.n_gen):
            n_come += 1
            if n_come == 1:
                ttft_s = last_s - first.at_s
                prefill = sum(self._read_bytes().values()) - sum(first.read_bytes.values())
            if begin is None and self._counts_from(n_come, last_s - first.at_s - ttft_s):
                begin, n_before = self._marks(api, last_s), n_come
        if begin is None or n_come == n_before:
            raise ClusterError(f"{api.url} made {n_come} tokens, {self._work.n_gen} were asked for")
        read, n_tokens = self._read_bytes(), n_come - n_before
        self._when_idle()
        time.sleep(STALE_S if self._is_prima else 0.0)
        self._cage.check_alive()
        end = Marks(last_s, read, *(told_by(api) if self._is_prima else ({}, None)))
        return Timed(ttft_s, (last_s - begin.at_s) / n_tokens, n_tokens, prefill, begin, end)

    def _counts_from(self, n_come: int, since_first_s: float) -> bool:
        """Late enough that what workers told last does not speak of the prompt, but half of the tokens count anyhow."""
        return n_come >= max(1, self._work.n_gen // 2) or (n_come >= SKIPPED and since_first_s > STALE_S)

    def _marks(self, api: Api | None = None, at_s: float | None = None) -> Marks:
        read = self._read_bytes()
        told = told_by(api) if api is not None and self._is_prima else ({}, None)
        return Marks(time.monotonic() if at_s is None else at_s, read, *told)

    def _read_bytes(self) -> dict[str, int]:
        return {cell.node.name: cell.group.read_bytes() for cell in self._cage.cells}

    # ------------------------------------------------------------ by what is printed

    def _printed(self, head: Program, others: Sequence[Program]) -> Timed:
        def check() -> None:
            for other in others:
                other.check_alive()

        measure, until_s = self._cluster.measure, time.monotonic() + RESULT_WITHIN_S
        if measure.begin:
            head.wait_for(measure.begin, until_s, check)
        begin = self._marks()
        pattern = measure.tokens_per_s or measure.ms_per_token
        number = _number(head.wait_for(pattern, until_s, check)[1], pattern)
        tpot_s = 1 / number if measure.tokens_per_s else number / 1000
        return Timed(None, tpot_s, self._work.n_gen, None, begin, self._marks())


def prompt_ids(n: int) -> tuple[int, ...]:
    """Ids that every vocabulary has."""
    return tuple(10 + index * 7 % 190 for index in range(n))


def _wait_until_ready(cell: Cell, program: Program, until_s: float) -> None:
    if cell.node.ready:
        program.wait_for(cell.node.ready, until_s)


def _number(text: str, pattern: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ClusterError(f"{pattern!r} found {text!r}, which is no speed", hint="check [measure] of the cluster")
    return number


def told_by(api: Api) -> tuple[Views, Forecast | None]:
    """What prima's nodes tell of themselves, and what the plan foretells. Raises ClusterError."""
    try:
        status, body = api.get("/nodes")
        told = msgspec.json.decode(body, type=Told) if status == 200 else Told()
        return {node["name"]: node for node in told.nodes}, told.forecast
    except (OSError, msgspec.DecodeError, KeyError) as error:
        raise ClusterError(f"the head does not tell how its nodes spend their time: {error}") from error


def _node_figures(cell: Cell, timed: Timed, watch: MemoryWatch) -> NodeFigures:
    name, drop_bytes = cell.node.name, watch.extremes[cell.node.name].drop_bytes
    limit, planned = cell.limits.memory_bytes, planned_bytes(timed.end.views.get(name))
    return NodeFigures(
        name=name,
        limit_bytes=limit,
        budget_bytes=cell.limits.budget_bytes,
        read_bytes_per_token=(timed.end.read_bytes[name] - timed.begin.read_bytes[name]) / timed.n_tokens,
        peak_bytes=cell.group.peak_bytes(),
        rss_bytes=watch.extremes[name].rss_bytes,
        pressure=drop_bytes / limit,
        planned_bytes=planned,
        pressure_beyond_plan=None if planned is None else max(0, drop_bytes - planned) / limit,
        told_per_token=dict(_per_token(name, timed)),
        forecast=_forecast_of(name, timed.end.forecast),
    )


def _forecast_of(name: str, forecast: Forecast | None) -> NodeForecast | None:
    return next((node for node in forecast.nodes if node.node == name), None) if forecast is not None else None


def stuck(api: Api, n_nodes: int) -> str | None:
    """Why a head waits although all nodes are there: no plan fits them, and no other node will ever come."""
    try:
        view = msgspec.json.decode(api.get("/nodes")[1], type=ServerView)
    except (OSError, msgspec.DecodeError):
        return None  # not up yet
    return view.reason if view.state is State.WAITING and len(view.nodes) == n_nodes and view.reason else None


def planned_bytes(view: Mapping[str, Any] | None) -> int | None:
    """Memory that the plan says a node takes: weights that stay, the buffer that others are read through, KV."""
    if view is None:
        return None
    streamed = sum(int(device.get("streamed_bytes", 0)) for device in view["devices"])
    buffer = int(view["times"].get("buffer_bytes", 0))
    return int(view["weight_bytes"]) + int(view["kv_bytes"]) + buffer - streamed


def _per_token(name: str, timed: Timed) -> Iterator[tuple[str, float]]:
    before, after = (marks.views.get(name, {}).get("times", {}) for marks in (timed.begin, timed.end))
    for key, value in after.items():
        if key in COUNTED or (key.endswith("_s") and key != "uptime_s"):
            yield key, (value - before.get(key, 0.0)) / timed.n_tokens
