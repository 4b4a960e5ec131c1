"""Pings over data links: who answers whom, and what is made of the times."""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from prima_core.errors import LinkBroken, LinkClosed, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink
from prima_core.ring import probes
from prima_core.ring.probes import MAX_PING_BYTES, MAX_PROBES, LinkFigures, Probes, is_probe
from prima_core.testing.cluster import DEADLINE_S, until
from prima_inproc.transport import InprocTransport

NOBODY, LIMITS = Credentials(), Limits()
ID, OTHER = b"i" * 16, b"o" * 16


class End:
    """A node's data link, whose messages go to its probes."""

    def __init__(self, transport: InprocTransport, exits: ExitStack) -> None:
        self.link: ReceiveLink = transport.listen("inproc://", NOBODY, LIMITS)
        self.dialled: list[str] = []
        self.received: list[bytes] = []
        self.probes = Probes(self._dial)
        self._transport = transport
        self._to_itself = transport.dial(self.address, NOBODY, LIMITS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        exits.callback(self.close)

    @property
    def address(self) -> str:
        return self.link.address

    def _dial(self, address: str) -> SendLink:
        self.dialled.append(address)
        return self._transport.dial(address, NOBODY, LIMITS)

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                data = self.link.receive(0.05)
            except LinkTimeout:
                continue
            self.received.append(bytes(data[:24]))
            assert is_probe(data)
            self.probes.arrived(data)

    def close(self) -> None:
        self.probes.close()
        self._stopping.set()
        self._thread.join()
        self._to_itself.close()
        self.link.close()

    def send(self, data: bytes) -> None:
        self._to_itself.send([data], DEADLINE_S)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[End, End]]:
    for name in ("ANSWER_S", "CONNECT_S", "LOST_AFTER_S"):
        monkeypatch.setattr(probes, name, 2 * DEADLINE_S)
    transport = InprocTransport()
    with ExitStack() as exits:
        yield End(transport, exits), End(transport, exits)


def test_a_node_that_answers_is_measured(ends: tuple[End, End]) -> None:
    a, b = ends
    b.probes.answer(ID, a.address)
    found = a.probes.measure(ID, b.address, 16_384)
    assert found is not None
    assert 0 <= found.latency_s < 1
    assert found.bytes_s > 0
    until("b no longer answers", lambda: not b.probes._answering)
    assert a.probes._awaited == {}


@pytest.mark.parametrize("allowed", [None, OTHER], ids=["nothing", "another probe"])
def test_nobody_is_answered_who_does_not_know_the_probe(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch, allowed: bytes | None
) -> None:
    monkeypatch.setattr(probes, "CONNECT_S", 0.2)
    a, b = ends
    if allowed is not None:
        b.probes.answer(allowed, a.address)
    assert a.probes.measure(ID, b.address, 100) is None
    assert a.received == []


def test_a_node_that_starts_to_answer_later_is_waited_for(ends: tuple[End, End]) -> None:
    a, b = ends
    found: queue.SimpleQueue[LinkFigures | None] = queue.SimpleQueue()
    a.probes.ask(ID, b.address, 100, found.put)
    until("pings come", lambda: len(b.received) > 0)
    b.probes.answer(ID, a.address)
    assert found.get(timeout=DEADLINE_S) is not None


def test_nobody_is_answered_for_ever(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ANSWER_S", -1.0)
    monkeypatch.setattr(probes, "CONNECT_S", 0.2)
    a, b = ends
    b.probes.answer(ID, a.address)
    assert a.probes.measure(ID, b.address, 100) is None


def test_a_probe_that_is_over_holds_no_link(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ANSWER_S", -1.0)
    a, b = ends
    b.probes.answer(ID, a.address)
    link = b.probes._answering[ID].link
    b.probes.let_go()
    with pytest.raises(LinkClosed):
        link.send([b"x"], 0.0)
    assert b.probes._answering == {}


def test_so_many_pings_are_answered_and_no_more(ends: tuple[End, End]) -> None:
    a, b = ends
    b.probes.answer(ID, a.address)
    ping = struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 1, ID, 7)
    for number in range(probes.MAX_PINGS):
        b.send(ping)
        until("the echo", lambda number=number: len(a.received) == number + 1)  # type: ignore[misc]
    b.probes.answer(OTHER, a.address)
    for id in (ID, ID, OTHER):
        b.send(struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 1, id, 7))
    until("the other probe's", lambda: a.received[-1][8:24] == OTHER)
    assert len(a.received) == probes.MAX_PINGS + 1


def test_so_many_probes_are_answered_at_a_time(ends: tuple[End, End]) -> None:
    a, b = ends
    for number in range(MAX_PROBES + 5):
        b.probes.answer(number.to_bytes(16, "little"), a.address)
    assert len(b.dialled) == MAX_PROBES


@pytest.mark.parametrize(
    "data",
    [
        b"PRMP" + bytes(36),
        struct.pack("<4sBB2x16sI12x", b"PRMP", 2, 1, ID, 7),
        struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 9, ID, 7),
        struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 2, OTHER, 7),
        struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 1, OTHER, 7) + bytes(1000),
    ],
    ids=["zeros", "another version", "no kind", "an echo of nothing", "a stranger's ping"],
)
def test_what_belongs_to_no_probe_is_dropped(ends: tuple[End, End], data: bytes) -> None:
    a, b = ends
    b.probes.answer(ID, a.address)
    b.send(data)
    until("it came", lambda: len(b.received) == 1)
    b.send(struct.pack("<4sBB2x16sI12x", b"PRMP", 1, 1, ID, 8))
    until("the echo", lambda: len(a.received) == 1)
    assert a.received[0][8:24] == ID


@pytest.mark.parametrize("data", [b"", b"PRMP", b"PRMA" + bytes(60), bytes(64)])
def test_frames_are_no_probes(data: bytes) -> None:
    assert not is_probe(memoryview(data))


def test_a_node_that_is_closed_gives_up(ends: tuple[End, End]) -> None:
    a, b = ends
    found: list[LinkFigures | None] = []
    a.probes.ask(ID, b.address, 100, found.append)
    until("pings come", lambda: len(b.received) > 0)
    a.probes.close()
    assert found == [None]


def test_a_node_that_is_closed_waits_for_no_echo(ends: tuple[End, End]) -> None:
    a, b = ends
    b.probes.answer(ID, a.address)
    b.probes._answering[ID].n_left = 1
    found: list[LinkFigures | None] = []
    a.probes.ask(ID, b.address, 100, found.append)
    until("it has pinged once more", lambda: len(b.received) > 1)
    a.probes.close()
    assert found == [None]


def test_who_has_waited_long_enough_waits_no_longer(ends: tuple[End, End]) -> None:
    a, b = ends
    assert a.probes.measure(ID, b.address, 100, within_s=0.1) is None


def test_an_address_that_can_never_work_is_not_known() -> None:
    def dial(address: str) -> SendLink:
        raise LinkBroken(f"{address} is no address")

    assert Probes(dial).measure(ID, "nonsense", 100) is None


# ---------------------------------------------------------------- figures


class Wire:
    """A link whose echoes come after as long as a wire of these figures takes, on a clock of its own."""

    def __init__(self, one_way_s: float, bytes_s: float, loses: int = 1 << 62) -> None:
        self.now, self.one_way_s, self.bytes_s, self.loses = 0.0, one_way_s, bytes_s, loses
        self.inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.peer, self.sizes, self.skips = "inproc://b", list[int](), set[int]()

    def perf_counter(self) -> float:
        return self.now

    def send(self, parts: list[bytes], timeout_s: float) -> None:
        size = sum(map(len, parts))
        kind, number = parts[0][5], struct.unpack_from("<I", parts[0], 24)[0]
        self.sizes.append(size)
        if kind == 1 and size < self.loses and number not in self.skips:
            self.now += 2 * self.one_way_s + size / self.bytes_s
            self.inbox.put(number)

    def close(self) -> None:
        pass

    def figures(self, n_bytes: int, is_brief: bool = False) -> LinkFigures:
        return probes._Pinger(ID, self, self.inbox, threading.Event()).figures(n_bytes, is_brief)  # type: ignore[arg-type]


@pytest.mark.parametrize(("one_way_s", "bytes_s"), [(0.003, 4e7), (0.0001, 1.1e8), (0.02, 2e6)])
def test_latency_and_rate_are_those_of_the_wire(
    monkeypatch: pytest.MonkeyPatch, one_way_s: float, bytes_s: float
) -> None:
    wire = Wire(one_way_s, bytes_s)
    monkeypatch.setattr(probes, "time", wire)
    found = wire.figures(16_384)
    assert found.bytes_s == pytest.approx(bytes_s, rel=0.01)
    token_s = found.latency_s + 16_384 / found.bytes_s
    assert token_s == pytest.approx(one_way_s + 16_384 / bytes_s, rel=0.01, abs=4e-5)
    assert max(wire.sizes) == MAX_PING_BYTES + 40


def test_one_lost_echo_is_no_lost_link(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(0.003, 4e7)
    monkeypatch.setattr(probes, "time", wire)
    monkeypatch.setattr(probes, "LOST_AFTER_S", 0.01)
    wire.skips = {5, 12}
    assert wire.figures(16_384).bytes_s == pytest.approx(4e7, rel=0.01)
    wire.skips = {5, 6}
    with pytest.raises(LinkTimeout):
        wire.figures(16_384)


def test_a_wire_that_loses_what_is_large_is_known_by_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(0.01, 1e5, loses=MAX_PING_BYTES)
    monkeypatch.setattr(probes, "time", wire)
    monkeypatch.setattr(probes, "LOST_AFTER_S", 0.01)
    assert wire.figures(16_384).bytes_s == pytest.approx(1e5, rel=0.01)


def test_a_wire_that_loses_what_is_large_is_not_faster_than_that_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(0.01, 1e15, loses=MAX_PING_BYTES)
    monkeypatch.setattr(probes, "time", wire)
    monkeypatch.setattr(probes, "LOST_AFTER_S", 0.01)
    assert wire.figures(16_384).bytes_s == MAX_PING_BYTES / 0.01


def test_in_brief_nothing_large_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(0.003, 1e7)
    monkeypatch.setattr(probes, "time", wire)
    found = wire.figures(16_384, is_brief=True)
    assert found.latency_s == pytest.approx(0.003 + 16_384 / 1e7, rel=0.01)
    assert found.bytes_s == 0
    assert max(wire.sizes) == 16_384 + 40
