"""`prima ps`: the nodes of a running server, and how they spend their time."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import groupby

import msgspec
import rich_click as click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prima_core.commands.setup import Settings
from prima_core.commands.table import wide_console
from prima_core.errors import ClusterError, ConfigError
from prima_core.model.visible import visible
from prima_core.node.view import DeviceView, NodeView, ServerView
from prima_core.ring.times import NodeTimes

TIMEOUT_S = 5.0
EVERY_S = 1.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
_ACTIVITIES = ("compute", "stall", "wait", "link", "disk")


def ps(as_json: bool, watch: bool, settings: Settings) -> None:
    """Print the view of the server at --host and --port once, or again and again until Ctrl-C."""
    if as_json:
        click.echo(msgspec.json.encode(fetch(settings)).decode())
    elif watch:
        with suppress(KeyboardInterrupt):
            follow(lambda: fetch(settings), Console())
    else:
        wide_console().print(shown(fetch(settings)))


def fetch(settings: Settings) -> ServerView:
    """What the server tells at /nodes. Raises ClusterError when it cannot be asked, ConfigError when it refuses."""
    host, port, key = settings["host"], settings["port"], settings["api_key"]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with closing(http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)) as connection:
        try:
            connection.request("GET", "/nodes", headers=headers)
            with connection.getresponse() as answer:
                body = answer.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(
                f"no server answers at {place}: {error}",
                hint="start one with `prima serve`, or name its --host and --port",
            ) from error
    if answer.status == 401:
        raise ConfigError(f"the server at {place} wants its API key", hint="set PRIMA_API_KEY (or --api-key)")
    try:
        return msgspec.json.decode(body, type=ServerView)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"what answers at {place} is no prima server of this version (status {answer.status})",
            hint="check --host and --port",
        ) from error


def follow(ask: Callable[[], ServerView], console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show what `ask` gives, about every second, with what was done since the last time; until it raises."""
    before: ServerView | None = None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            view = ask()
            live.update(shown(view, before), refresh=True)
            before = view
            sleep(EVERY_S)


# ---------------------------------------------------------------- tables


def shown(view: ServerView, before: ServerView | None = None) -> RenderableType:
    """As a table: sums since the start, or with an earlier view the shares and rates of the time between the two."""
    old = {} if before is None else {node.name: node.times for node in before.nodes}
    table = Table("node", "devices", "layers", "memory", *_ACTIVITIES, "tokens", "sent", "read")
    for node in view.nodes:
        earlier = old.get(node.name)
        figures = _sums(node.times) if earlier is None else _rates(node.times, earlier)
        table.add_row(*map(_text, (*_facts(node), *figures)))
    return Group(*map(_text, _lines(view)), table)


def _text(cell: str) -> Text:
    return Text(visible(cell))


def _lines(view: ServerView) -> list[str]:
    state = f"{view.model}: {view.state.value}" + (f", {view.reason}" if view.reason else "")
    used = f"{view.kv_tokens_used:,} of {view.kv_tokens:,} KV positions reserved"
    return [
        state,
        f"{view.n_running} running, {view.n_waiting} waiting, {used}, context {view.context_length:,}",
        *([view.summary] if view.summary else []),
        *_speed(view),
        *_links(view),
    ]


def _speed(view: ServerView) -> Iterator[str]:
    """What the plan foretold of one answer at a time, and what the last one had."""
    if view.forecast is None:
        return
    ms, limit = 1e3 * view.forecast.token_s, view.forecast.limit
    if view.forecast.width > 1:
        together = f"{view.forecast.width} sequences, {view.forecast.tokens_s:.3g} tokens/s"
        yield f"foretold: {ms:,.1f} ms per token of each of {together}, most of it {limit}"
    else:
        measured = f", {1e3 * view.token_s:,.1f} ms in the last answer" if view.token_s else ""
        yield f"foretold: {ms:,.1f} ms per token, most of it {limit}{measured}"


def _links(view: ServerView) -> Iterator[str]:
    """A line for each node that activations can leave."""
    for source, links in groupby(view.links, lambda link: link.source):
        yield f"links from {source}: " + "; ".join(
            f"to {link.target} {1e3 * link.latency_s:,.2f} ms, {_size(link.bytes_s)}/s" for link in links
        )


def _facts(node: NodeView) -> tuple[str, str, str, str]:
    """The last three: a line for each device."""
    ranges = (", ".join(f"[{part.start}, {part.stop})" for part in device.layers) or "-" for device in node.devices)
    output = " + output" if node.has_output and not node.is_head else ""
    layers = "\n".join(ranges) + output + (f" loading {node.loaded:.0%}" if node.loaded is not None else "")
    memory = "\n".join((*(_memory(device, node) for device in node.devices), *_remarks(node)))
    devices = "\n".join(device.id for device in node.devices)
    return f"{node.name} (head)" if node.is_head else node.name, devices, layers, memory


def _memory(device: DeviceView, node: NodeView) -> str:
    """Of what the node offers: a device may see more."""
    kept, streamed = device.weight_bytes - device.streamed_bytes, device.streamed_bytes
    held = f"{_size(kept)} + {_size(device.kv_bytes)} KV of {_size(min(device.memory_bytes, node.memory_bytes))}"
    return f"{held}, {_size(streamed)} from disk" if streamed else held


def _remarks(node: NodeView) -> Iterator[str]:
    """Weights that the plan wanted to stay, where other programs need the memory now; how many of the experts that were
    chosen were in memory; a disk that is slow."""
    given = node.times.streamed_bytes - sum(device.streamed_bytes for device in node.devices)
    if given > node.weight_bytes // 100:  # tensors are whole: a little more than planned is nothing
        yield f"{_size(given)} left to others for now"
    if node.times.expert_hit_rate is not None:
        yield f"experts: {node.times.expert_hit_rate:.0%} were in memory"
    yield from node.off


def _sums(times: NodeTimes) -> tuple[str, ...]:
    seconds = (f"{getattr(times, f'{activity}_s'):,.2f} s" for activity in _ACTIVITIES)
    return *seconds, f"{times.n_tokens:,}", _size(times.sent_bytes), _size(times.read_bytes)


def _rates(now: NodeTimes, before: NodeTimes) -> tuple[str, ...]:
    """By the node's own clock: what it told last may be half a second old. A node that was started anew begins at 0."""
    passed_s = now.uptime_s - before.uptime_s

    def rate(name: str) -> float:
        return max(0.0, (getattr(now, name) - getattr(before, name)) / passed_s) if passed_s > 0 else 0.0

    shares = (f"{rate(f'{activity}_s'):.0%}" for activity in _ACTIVITIES)
    sent, read = (f"{_size(rate(name))}/s" for name in ("sent_bytes", "read_bytes"))
    return *shares, f"{rate('n_tokens'):,.0f}/s", sent, read


def _size(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.3g} {unit}"
    return f"{n_bytes:.0f} B"
