"""Nodes that serve otherwise than plans take them to: named, with what is off, so that somebody can look."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from prima_core.engine.facts import EngineFacts
from prima_core.events import RequestDone
from prima_core.node.driver import Relearned, Status
from prima_core.node.member import Member
from prima_core.node.view import own_rate, token_s
from prima_core.plan.forecast import Forecast
from prima_core.plan.plan import Plan
from prima_core.plan.problem import LinkFacts
from prima_core.ring.times import NodeTimes

OFF = 0.25
NEWS = 0.1
LEAST_STEPS, LEAST_S = 32, 1.0
"""Of computing, that are judged together: one late step is no drift."""
LEAST_READING_S = 3.0
LINK_LEAST_S = 0.001
"""Links vary by so much without a reason."""
LEAST_LINK_S = 1e-6
"""What is measured of a quick link may come out as nothing."""
MOST_POSITIONS = 2048
"""Of a sequence: attention over more takes time that no profile knows."""


@dataclass(slots=True)
class _Seen:
    """What a node told last, and what it has computed since the last judgement, in steps as they were foretold."""

    times: NodeTimes
    plan: Plan | None = None
    compute_s: float = 0.0
    n_steps: int = 0
    is_clean: bool = False


class DriftWatch:
    """Looks at the times of nodes as they come, from any thread. `tell`: once for each node and what is off there, when
    that was so twice in a row: another program may have been at work for a moment. `learned`: the same, for plans to be
    made with, and when it has passed."""

    def __init__(self, tell: Callable[[str], None], learned: Callable[[Relearned], None]) -> None:
        self._tell, self._learned = tell, learned
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._read: dict[str, NodeTimes] = {}  # as it was when the disk was judged last
        self._doubtful: set[tuple[str, str]] = set()  # ends of links that were off the last time
        self._off: dict[tuple[str, str], str] = {}  # by node and what
        self._told: set[tuple[str, str]] = set()
        self._doubted: set[tuple[str, str]] = set()  # off the last time, and not told
        self._times: dict[str, float] = {}  # how many times as fast as foretold a node was said to compute
        self._longer: dict[tuple[str, str], float] = {}  # how many times as long as measured a link was said to take

    def see(self, name: str, times: NodeTimes, status: Status, engine: EngineFacts) -> None:
        member = next((member for member in status.members if member.name == name), None)
        if member is None:
            return
        with self._lock:
            self._see_disk(member, times, status)
            if status.plan is not None and status.plan.forecast is not None and member.is_measured:
                self._see_computing(name, times, status.plan, status.plan.forecast, engine)

    def answered(self, done: RequestDone, forecast: Forecast | None, engine: EngineFacts) -> None:
        """A request has ended."""
        took_s, n_positions = token_s(done), done.n_prompt_tokens + done.n_generated_tokens
        is_plain = done.n_generated_tokens >= LEAST_STEPS and n_positions <= MOST_POSITIONS and len(engine.running) <= 1
        if forecast is None or forecast.width > 1 or took_s is None or not is_plain:
            return
        now, foretold = 1e3 * took_s, 1e3 * forecast.token_s
        said = f"an answer took {now:,.1f} ms per token, {foretold:,.1f} ms were foretold (`prima ps` shows for what)"
        with self._lock:
            self._set("", "answers", said if _is_off(now, foretold) else "")

    def see_link(self, link: LinkFacts, before_s: float, now_s: float) -> bool:
        """How long a token's activations took when it was measured and now; whether that is to be looked at once more:
        a link is off that is so twice."""
        is_off = abs(now_s - before_s) > max(OFF * before_s, LINK_LEAST_S)
        with self._lock:
            was_off = (link.source, link.target) in self._doubtful
            if is_off and not was_off:
                self._doubtful.add((link.source, link.target))
                return True
            now, before = 1e3 * now_s, 1e3 * before_s
            said = f"sends a token to {link.target} in {now:,.1f} ms; {before:,.1f} ms were measured when they met"
            self._learn_link(link, max(now_s, LEAST_LINK_S) / max(before_s, LEAST_LINK_S) if is_off else 1.0)
            self._set(link.source, f"link to {link.target}", said if is_off else "", is_sure=True)
            if not is_off:
                self._doubtful.discard((link.source, link.target))
        return False

    def lost(self, name: str) -> None:
        with self._lock:
            self._doubtful = {ends for ends in self._doubtful if name not in ends}
            self._longer = {ends: longer for ends, longer in self._longer.items() if name not in ends}
            self._seen.pop(name, None)
            self._read.pop(name, None)
            about = {key for key in (*self._off, *self._told) if key[0] == name or key[1] == f"link to {name}"}
            self._told -= about
            self._doubted -= about
            self._off = {key: said for key, said in self._off.items() if key not in about}

    def off(self, name: str) -> tuple[str, ...]:
        """What is off of a node, a line each."""
        with self._lock:
            return tuple(said for (node, _), said in sorted(self._off.items()) if node == name)

    # ------------------------------------------------------------ with the lock

    def _see_disk(self, member: Member, times: NodeTimes, status: Status) -> None:
        """Only of a disk that is slower: of those that others read from too a node can get more than its share."""
        before = self._read.setdefault(member.name, NodeTimes())
        reading_s = times.reading_s - before.reading_s
        if reading_s < LEAST_READING_S:
            return
        self._read[member.name] = times
        rate, measured = (times.read_bytes - before.read_bytes) / reading_s, own_rate(member, status.members)
        said = f"reads its weights at {rate / 1e6:,.0f} MB/s; {measured / 1e6:,.0f} MB/s were measured"
        self._set(member.name, "disk", said if rate < (1 - OFF) * measured else "")

    def _see_computing(self, name: str, times: NodeTimes, plan: Plan, forecast: Forecast, engine: EngineFacts) -> None:
        seen = self._seen.get(name)
        if seen is None or seen.plan is not plan:
            self._seen[name] = _Seen(times, plan)
            self._times.pop(name, None)
            return
        before, seen.times = seen.times, times
        n_steps, n_tokens = times.n_steps - before.n_steps, times.n_tokens - before.n_tokens
        was_clean, seen.is_clean = seen.is_clean, _is_plain(engine) and n_tokens == n_steps * forecast.width
        if not (seen.is_clean and was_clean):  # of a step before, a part may have come after it was counted
            seen.compute_s, seen.n_steps = 0.0, 0
            return
        seen.compute_s += times.compute_s - before.compute_s
        seen.n_steps += n_steps
        if seen.n_steps >= LEAST_STEPS and seen.compute_s >= LEAST_S:
            foretold_s = next((node.compute_s for node in forecast.nodes if node.node == name), 0.0)
            self._judge(name, seen.compute_s / seen.n_steps, foretold_s, plan)
            seen.compute_s, seen.n_steps = 0.0, 0

    def _judge(self, name: str, now_s: float, foretold_s: float, plan: Plan) -> None:
        said = f"computes a token in {1e3 * now_s:,.1f} ms; {1e3 * foretold_s:,.1f} ms were foretold"
        is_off = bool(foretold_s) and _is_off(now_s, foretold_s)
        is_sure = not is_off or (name, "computing") in self._doubted
        self._set(name, "computing", said if is_off else "")
        if is_sure:
            self._learn(name, foretold_s / now_s if is_off else 1.0, plan)

    def _learn(self, name: str, times: float, plan: Plan) -> None:
        """What is about as before is no news."""
        before = self._times.get(name, 1.0)
        if abs(times - before) > NEWS * before:
            self._times[name] = times
            self._learned(Relearned(name, times, plan=plan))

    def _learn_link(self, link: LinkFacts, longer: float) -> None:
        """Both of its figures are taken to have changed alike."""
        ends = link.source, link.target
        before = self._longer.get(ends, 1.0)
        if abs(longer - before) > NEWS * before:
            self._longer[ends] = longer
            now = msgspec.structs.replace(
                link, latency_s=longer * max(link.latency_s, LEAST_LINK_S), bytes_s=link.bytes_s / longer
            )
            self._learned(Relearned(link.source, link=now))

    def _set(self, name: str, what: str, said: str, is_sure: bool = False) -> None:
        key = name, what
        if not said:
            self._off.pop(key, None)
            self._doubted.discard(key)
            return
        self._off[key] = said
        if key not in self._told and (is_sure or key in self._doubted):
            self._told.add(key)
            self._tell(f"node {name} {said}" if name else said)
        self._doubted.add(key)


def _is_off(now: float, foretold: float) -> bool:
    return abs(now - foretold) > OFF * foretold


def _is_plain(engine: EngineFacts) -> bool:
    """Whether steps are as forecasts take them to be: an answer at a time, not yet a long one."""
    return len(engine.running) <= 1 and all(one.n_computed <= MOST_POSITIONS for one in engine.running)
