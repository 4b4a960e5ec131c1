"""`prima run`, `prima chat` and `prima bench`: use a model from the terminal, through the same ring as the server."""

from __future__ import annotations

import queue
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import rich_click as click

from prima_core.commands.setup import Settings, say, serving_head
from prima_core.engine.request import GREEDY, Event, Failed, Finished, Piece, Request, answer_tokens
from prima_core.errors import ClusterError, RequestError
from prima_core.model.names import TOKEN_EMBD
from prima_core.model.weights import Model
from prima_core.node.head import Head
from prima_core.node.view import NodeView, ServerView
from prima_core.plan.forecast import Forecast
from prima_core.plugins import Registry
from prima_core.ring.membership import LOST_AFTER_S
from prima_core.ring.times import NodeTimes


@dataclass(slots=True)
class Timings:
    """Seconds and counts of one request; rates are tokens per second."""

    n_prompt: int
    n_generated: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def token(self) -> None:
        self.n_generated += 1
        self.total_s = time.perf_counter() - self._start
        self.ttft_s = self.ttft_s or self.total_s

    @property
    def prefill_tok_s(self) -> float:
        return self.n_prompt / self.ttft_s if self.ttft_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        took = self.total_s - self.ttft_s
        return (self.n_generated - 1) / took if took else 0.0

    def facts(self) -> dict[str, float]:
        return {
            "n_prompt": self.n_prompt,
            "n_generated": self.n_generated,
            "ttft_s": round(self.ttft_s, 6),
            "total_s": round(self.total_s, 6),
            "prefill_tok_s": round(self.prefill_tok_s, 3),
            "decode_tok_s": round(self.decode_tok_s, 3),
        }


def events(head: Head, request: Request) -> Iterator[Piece | Finished]:
    """The events of a request, Finished last; leaving early cancels it. Raises the error of a failed one."""
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    number = head.submit(request, inbox.put)
    try:
        while True:
            event = _next(inbox)
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return
    finally:
        head.cancel(number)


def _next(inbox: queue.SimpleQueue[Event]) -> Event:
    while True:
        with suppress(queue.Empty):
            return inbox.get(timeout=0.2)  # a wait without end is deaf to Ctrl-C on Windows


def make_request(head: Head, prompt: list[int], settings: Settings) -> Request:
    """As many tokens as asked for, cut to what the context has left unless it shifts."""
    n_tokens = answer_tokens(settings.get("max_tokens"), len(prompt), head.context_length, head.context_shift)
    if n_tokens < 1 or len(prompt) > head.context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the context has {head.context_length}",
            hint="shorten the prompt, or use a longer context (-c)",
        )
    seed = settings.get("seed")
    sampling = replace(head.sampling, seed=secrets.randbits(63) if seed is None else seed)
    return Request(tuple(prompt), n_tokens, sampling)


# ---------------------------------------------------------------- prima run


def run(model: str | None, prompt: str, raw: bool, as_json: bool, settings: Settings, registry: Registry) -> None:
    """Answer one prompt; the text streams to standard output."""
    with serving_head(model, settings, registry) as head:
        ids = _prompt_ids(head, prompt, raw)
        request = make_request(head, ids, settings)
        timings, generated, text = Timings(len(ids)), list[int](), list[str]()
        for event in events(head, request):
            if isinstance(event, Piece):
                timings.token()
                generated.append(event.token)
            text.append(event.text)
            if not as_json:
                _write(event.text)
        if not as_json:
            _write("\n")
            return
        facts = {"prompt_ids": ids, "generated_ids": generated, "text": "".join(text), "timings": timings.facts()}
        click.echo(msgspec.json.encode(facts).decode())


def _prompt_ids(head: Head, prompt: str, raw: bool) -> list[int]:
    if raw:
        return head.tokenizer.encode(prompt, add_special=True)
    return head.encode_chat([{"role": "user", "content": prompt}]).ids


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# ---------------------------------------------------------------- prima chat

CHAT_HELP = "/new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(model: str | None, settings: Settings, registry: Registry) -> None:
    """Talk to the model in the terminal; without one, a line of standard input is a turn."""
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history for `input`; not on Windows
    with serving_head(model, settings, registry) as head:
        say(f"{head.model_name}: {CHAT_HELP}")
        messages: list[dict[str, str]] = []
        while (line := _ask()) is not None:
            if line == "/exit":
                return
            if line == "/new":
                messages.clear()
            elif line.startswith("/"):
                say(CHAT_HELP)
            elif line:
                _answer(head, messages, line, settings)


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(head: Head, messages: list[dict[str, str]], line: str, settings: Settings) -> None:
    """One turn. In a terminal Ctrl-C stops the answer only; what was said of it stays in the conversation."""
    messages.append({"role": "user", "content": line})
    text: list[str] = []
    try:
        for event in events(head, make_request(head, head.encode_chat(messages).ids, settings)):
            text.append(event.text)
            _write(text[-1])
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except (RequestError, ClusterError) as error:
        messages.pop()
        say(f"{error}; /new starts over")
        return
    _write("\n")
    messages.append({"role": "assistant", "content": "".join(text)})


# ---------------------------------------------------------------- prima bench


def bench(model: str | None, n_prompt: int, n_gen: int, as_json: bool, settings: Settings, registry: Registry) -> None:
    """Time a prompt and a generation, each token of it."""
    with serving_head(
        model, {**settings, "context": settings["context"] or n_prompt + n_gen, "n_prompt": n_prompt}, registry
    ) as head:
        _timed(head, n_prompt, n_gen)  # warms up
        timings, nodes = _timed(head, n_prompt, n_gen)
        facts = bench_facts(head, timings, nodes)
    if as_json:
        click.echo(msgspec.json.encode(facts).decode())
        return
    for name, value in facts.items():
        click.echo(f"{name:24} {_shown(value)}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(f"{node.pop('node')}: {_shown(node)}" for node in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return f"{value:,.3f}" if isinstance(value, float) else f"{value}"


def _timed(head: Head, n_prompt: int, n_gen: int) -> tuple[Timings, list[dict[str, Any]]]:
    """And what each node did from the first token on."""
    prompt = tuple(index % min(256, head.tokenizer.vocab_size) for index in range(n_prompt))
    timings, begun = Timings(n_prompt), head.view()
    for event in events(head, Request(prompt, n_gen, GREEDY, ignore_eos=True, reuse_prefix=False)):
        if isinstance(event, Piece):
            timings.token()
            begun = head.view() if timings.n_generated == 1 else begun
    return timings, [_node_facts(node, begun) for node in _told_since(head, head.view()).nodes]


def _told_since(head: Head, view: ServerView) -> ServerView:
    """The cluster when every node has told of its times again, or does not any more."""
    until_s = time.monotonic() + LOST_AFTER_S
    heard = {node.name: node.times.uptime_s for node in view.nodes}
    while time.monotonic() < until_s and any(node.times.uptime_s <= heard[node.name] for node in head.view().nodes):
        time.sleep(0.02)
    return head.view()


def _node_facts(node: NodeView, begun: ServerView) -> dict[str, Any]:
    """Of each step, which here is a token: seconds, and bytes read. What a node told last when the first token came may
    be half a second old."""
    now, before = node.times, next((other.times for other in begun.nodes if other.name == node.name), NodeTimes())
    n_steps = max(1, now.n_steps - before.n_steps)
    sums = ("compute_s", "stall_s", "wait_s", "link_s", "read_bytes")
    return {
        "node": node.name,
        **{f"{name}_per_token": (getattr(now, name) - getattr(before, name)) / n_steps for name in sums},
        "expert_hit_rate": NodeTimes(
            expert_hits=max(0, now.expert_hits - before.expert_hits),
            expert_misses=max(0, now.expert_misses - before.expert_misses),
        ).expert_hit_rate,
        "disk_bytes_s": now.read_bytes / now.reading_s if now.reading_s else 0.0,
        "pinned_bytes": now.pinned_bytes,
        "streamed_bytes": now.streamed_bytes,
        "buffer_bytes": now.buffer_bytes,
    }


def bench_facts(head: Head, timings: Timings, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures by name."""
    touched, status = touched_bytes(head.model), head.driver.status
    forecast = status.plan.forecast if status.plan is not None else None
    return {
        "model": head.model_name,
        "nodes": len(status.members),
        "n_prompt": timings.n_prompt,
        "n_generated": timings.n_generated,
        "prefill_tok_s": timings.prefill_tok_s,
        "ttft_s": timings.ttft_s,
        "decode_tok_s": timings.decode_tok_s,
        "tpot_ms": 1000 / timings.decode_tok_s if timings.decode_tok_s else 0.0,
        **({} if forecast is None else {"foretold_tpot_ms": 1000 * forecast.token_s}),
        "weight_bytes_per_token": touched,
        "weight_gb_s": touched * timings.decode_tok_s / 1e9,
        "rss_bytes": _rss(),
        "peak_rss_bytes": sum(map(_peak_rss, _family())),
        "per_node": [{**node, **_foretold(node["node"], forecast)} for node in nodes],
    }


def _foretold(name: str, forecast: Forecast | None) -> dict[str, float]:
    """Of a node, beside what was measured."""
    nodes = () if forecast is None else forecast.nodes
    return {
        f"foretold_{field}_per_token": getattr(node, field)
        for node in nodes
        if node.node == name
        for field in ("compute_s", "stall_s", "link_s", "read_bytes")
    }


def touched_bytes(model: Model) -> int:
    """What a decoded token reads: every layer, but of its experts only those that are used, the output matrix, and one
    row of the embeddings, which is next to nothing."""
    experts, total = model.spec.experts, 0
    for name, info in model.file.tensors.items():
        if experts is not None and len(info.shape) == 3:
            total += info.n_bytes // experts.count * experts.n_used
        elif name != TOKEN_EMBD or model.spec.tied_output:
            total += info.n_bytes
    return total


def _rss() -> int:
    """Resident memory of this process and its children; mapped weights are counted in each."""
    return sum(process.memory_info().rss for process in _family())


def _family() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _peak_rss(process: psutil.Process) -> int:
    """The most that a process has had; where the system does not tell, what it has."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    memory = process.memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
