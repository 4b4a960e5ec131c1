"""Who is in the cluster: workers played by hand over in-process links, on a clock that the test turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import pytest

from prima_core.errors import ClusterError, LinkTimeout, PluginError
from prima_core.interfaces import Buffer, Credentials, Limits, ReceiveLink, SendLink
from prima_core.plan.problem import DeviceFacts
from prima_core.ring import control, membership
from prima_core.ring.control import Bye, Heartbeat, Hello, Progress, Release, Session
from prima_core.ring.membership import HEARTBEAT_S, LOST_AFTER_S, MAX_PENDING, Listener, Membership, PeerFacts
from prima_core.ring.times import NodeTimes
from prima_core.ring.wire import Epoch
from prima_inproc.transport import InprocTransport

SECRET = b"s" * 32
EPOCH = Epoch(1, 1)
NOBODY = Credentials()


@dataclass
class FakeClock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Table:
    """A head's membership and the wire that it hangs on."""

    def __init__(self) -> None:
        self.transport = InprocTransport()
        self.clock = FakeClock()
        self.told: list[tuple[object, ...]] = []
        self.dialled: list[str] = []
        self.dial: Callable[[str], SendLink] = lambda address: self.transport.dial(address, NOBODY, Limits())
        listener = Listener(
            lambda facts: self.told.append(("joined", facts.name)),
            lambda name, why: self.told.append(("lost", name, why)),
            lambda name, message: self.told.append(("told", name, message)),
            lambda name, times: self.told.append(("timed", name, times)),
        )
        link = self.transport.listen("inproc://control", NOBODY, Limits(max_queued=1000))
        self.members = Membership("head", "head-id", link, self._dial, SECRET, listener, self.clock)
        self.to_head = self.transport.dial("inproc://control", NOBODY, Limits())

    def _dial(self, address: str) -> SendLink:
        self.dialled.append(address)
        return self.dial(address)

    def send(self, frame: bytes) -> None:
        self.to_head.send([frame], 1.0)

    def turn(self, passed_s: float = 0.0) -> None:
        self.clock.now_s += passed_s
        self.members.turn()

    def worker(
        self, name: str, node_id: str = "", secret: bytes = SECRET, speaks: str = version("prima-llm")
    ) -> HandWorker:
        return HandWorker(self, name, node_id, secret, speaks)


class HandWorker:
    """A worker whose every step the test does."""

    def __init__(self, table: Table, name: str, node_id: str, secret: bytes, speaks: str) -> None:
        self.table = table
        self.secret = secret
        self.link: ReceiveLink = table.transport.listen("inproc://", NOBODY, Limits())
        self.hello = Hello(
            node_id=node_id or f"id of {name} at {self.link.address}",
            nonce=control.new_nonce(),
            name=name,
            version=speaks,
            control_address=self.link.address,
            data_addresses=("inproc://data",),
            memory_bytes=1000,
            devices=(control.DeviceInfo("numpy:cpu", 1000),),
        )
        self.session: Session | None = None

    @property
    def hello_frame(self) -> bytes:
        return control.hello_frame(self.hello, self.secret)

    def knock(self) -> None:
        self.table.send(self.hello_frame)
        self.table.turn()

    def take_answer(self) -> str:
        """The name that the head gives. Raises its refusal."""
        welcome = control.open_answer(self.link.receive(0), self.hello, self.secret)
        self.session = control.worker_session(self.hello, welcome, self.secret)
        return welcome.name

    def join(self) -> str:
        self.knock()
        name = self.take_answer()
        self.say(Heartbeat())
        return name

    def sealed(self, message: control.Message) -> bytes:
        assert self.session is not None
        return self.session.seal(message)

    def say(self, message: control.Message) -> None:
        self.table.send(self.sealed(message))
        self.table.turn()

    def heard(self) -> list[control.Message]:
        assert self.session is not None
        return [self.session.open(frame) for frame in self.frames()]

    def frames(self) -> Iterator[memoryview]:
        while True:
            try:
                yield self.link.receive(0)
            except LinkTimeout:
                return


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    monkeypatch.setattr(membership, "POLL_S", 0.0)
    made = Table()
    yield made
    made.members.close("the test is over")


# ---------------------------------------------------------------- joining


def test_a_worker_has_joined_when_its_first_message_is_opened(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.knock()
    assert worker.take_answer() == "kitchen"
    assert table.told == []
    worker.say(Heartbeat())
    assert table.told == [("joined", "kitchen")]


def test_the_times_of_a_heartbeat_are_told(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    worker.say(Heartbeat(NodeTimes(compute_s=2.0)))
    assert table.told == [("joined", "kitchen"), ("timed", "kitchen", NodeTimes(compute_s=2.0))]


def test_what_the_hello_said_is_told(table: Table) -> None:
    facts: list[PeerFacts] = []
    table.members._listener = Listener(
        facts.append, lambda name, why: None, lambda name, message: None, lambda name, times: None
    )
    table.worker("kitchen").join()
    assert facts == [PeerFacts("kitchen", 1000, (DeviceFacts("numpy:cpu", 1000),), "inproc://data")]


def test_who_does_not_know_the_token_is_not_answered(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    stranger = table.worker("stranger", secret=b"x" * 32)
    stranger.knock()
    assert list(stranger.frames()) == []
    assert (table.told, table.dialled) == ([], [])
    assert "token" in caplog.text


def test_who_answers_with_a_key_of_its_own_does_not_join(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.knock()
    worker.take_answer()
    welcome = control.Welcome("head-id", control.new_nonce(), "kitchen", worker.hello.version)
    worker.session = control.worker_session(worker.hello, welcome, SECRET)
    worker.say(Heartbeat())
    assert table.told == []


def test_a_hello_that_is_said_again_gets_the_same_answer(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.knock()
    worker.knock()
    first, second = (bytes(frame) for frame in worker.frames())
    assert first == second
    assert table.dialled == [worker.link.address]


def test_the_answer_waits_for_a_worker_that_does_not_listen_yet(table: Table) -> None:
    worker = table.worker("kitchen")
    address = worker.link.address
    worker.link.close()
    worker.knock()
    worker.link = table.transport.listen(address, NOBODY, Limits())
    table.turn()
    assert worker.take_answer() == "kitchen"


def test_another_version_is_told_to_the_worker(table: Table) -> None:
    worker = table.worker("old", speaks="0.0.1")
    worker.knock()
    with pytest.raises(ClusterError, match=rf"has prima 0\.0\.1, the head has {version('prima-llm')}"):
        worker.take_answer()
    table.turn(LOST_AFTER_S + 1)
    assert table.told == []


@pytest.mark.parametrize("error", [ClusterError("cannot dial"), PluginError("no such scheme")], ids=str)
def test_a_worker_whose_address_cannot_be_dialled_hurts_nobody_else(table: Table, error: Exception) -> None:
    def dial(address: str) -> SendLink:
        raise error

    usual, table.dial = table.dial, dial
    table.worker("wrong").knock()
    table.dial = usual
    table.worker("kitchen").join()
    assert table.told == [("joined", "kitchen")]


# ---------------------------------------------------------------- names


def test_the_second_of_a_name_gets_a_number(table: Table) -> None:
    assert [table.worker("desk").join() for _ in range(3)] == ["desk", "desk-2", "desk-3"]


def test_no_worker_gets_the_name_of_the_head(table: Table) -> None:
    assert table.worker("head").join() == "head-2"


def test_a_name_is_free_when_its_node_has_gone(table: Table) -> None:
    first = table.worker("desk")
    first.join()
    first.say(Bye())
    assert table.worker("desk").join() == "desk"


# ---------------------------------------------------------------- joining again


def test_a_node_that_joins_again_ends_its_older_session(table: Table) -> None:
    first = table.worker("desk", node_id="me")
    first.join()
    again = table.worker("desk", node_id="me")
    assert again.join() == "desk"
    assert table.told == [("joined", "desk"), ("lost", "desk", "it joined again"), ("joined", "desk")]
    first.say(control.Ready(EPOCH))
    again.say(Release())
    assert table.told[3:] == [("told", "desk", Release())]


def test_the_older_session_stays_until_the_new_one_has_spoken(table: Table) -> None:
    first = table.worker("desk", node_id="me")
    first.join()
    again = table.worker("desk", node_id="me")
    again.knock()
    first.say(control.Ready(EPOCH))
    assert table.told == [("joined", "desk"), ("told", "desk", control.Ready(EPOCH))]


# ---------------------------------------------------------------- replays and floods


def test_a_replayed_hello_changes_nothing_for_the_node_that_said_it(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    list(worker.frames())
    table.send(worker.hello_frame)
    table.turn()
    worker.say(control.Ready(EPOCH))
    assert table.told == [("joined", "kitchen"), ("told", "kitchen", control.Ready(EPOCH))]


def test_a_hello_that_is_replayed_after_the_node_has_gone_joins_nobody(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    first = worker.sealed(Heartbeat())
    worker.say(Bye())
    for frame in (worker.hello_frame, first):
        table.send(frame)
        table.turn()
    table.turn(LOST_AFTER_S + 1)
    assert [what for what, *_ in table.told] == ["joined", "lost"]


def test_a_replayed_message_is_not_heard_again(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    worker = table.worker("kitchen")
    worker.join()
    frame = worker.sealed(control.Ready(EPOCH))
    for _ in range(2):
        table.send(frame)
        table.turn()
    assert table.told == [("joined", "kitchen"), ("told", "kitchen", control.Ready(EPOCH))]
    assert "replayed" in caplog.text


def test_a_replayed_message_does_not_keep_a_dead_node_alive(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    frame = worker.sealed(Heartbeat())
    for _ in range(3):
        table.send(frame)
        table.turn(LOST_AFTER_S / 2)
    table.turn(LOST_AFTER_S / 2)
    assert [what for what, *_ in table.told] == ["joined", "lost"]


def test_a_flood_of_hellos_opens_so_many_handshakes_and_no_more(table: Table) -> None:
    for index in range(MAX_PENDING + 20):
        table.worker(f"flood-{index}").knock()
    assert len(table.dialled) == MAX_PENDING
    late = table.worker("kitchen")
    late.knock()
    assert list(late.frames()) == []


def test_handshakes_that_nobody_goes_on_with_are_forgotten(table: Table) -> None:
    for index in range(MAX_PENDING):
        table.worker(f"flood-{index}").knock()
    table.turn(LOST_AFTER_S + 0.1)
    assert table.worker("kitchen").join() == "kitchen"
    assert table.told == [("joined", "kitchen")]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRMC" + bytes(200),
        b"\x00" * 100_000,
        control.Session(b"k" * 32, is_head=False).seal(Heartbeat()),
        control.answer_frame(
            control.Welcome("x", b"n" * 16, "x", "1"),
            Hello("x", b"n" * 16, "x", "1", "inproc://x", ("inproc://x",), 1, ()),
            SECRET,
        ),
    ],
    ids=["empty", "http", "no kind", "zeros", "unknown session", "an answer"],
)
def test_frames_of_strangers_are_dropped(table: Table, frame: bytes) -> None:
    worker = table.worker("kitchen")
    worker.join()
    table.send(frame)
    worker.say(control.Ready(EPOCH))
    assert table.told == [("joined", "kitchen"), ("told", "kitchen", control.Ready(EPOCH))]


# ---------------------------------------------------------------- silence


def test_a_silent_node_is_lost(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    table.turn(LOST_AFTER_S)
    assert len(table.told) == 1
    table.turn(0.1)
    assert table.told[1:] == [("lost", "kitchen", f"nothing was heard of it for {LOST_AFTER_S:g} s")]


def test_heartbeats_keep_a_node(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    for _ in range(10):
        table.send(worker.sealed(Heartbeat()))
        table.turn(LOST_AFTER_S - 0.1)
    assert table.told == [("joined", "kitchen")]


def test_silence_is_judged_when_all_that_came_was_read(table: Table) -> None:
    """The head itself may have been held up: then its workers' heartbeats lie in the queue."""
    workers = [table.worker(f"node-{index}") for index in range(4)]
    for worker in workers:
        worker.join()
    for worker in workers:
        table.send(worker.sealed(Heartbeat()))
    table.turn(10 * LOST_AFTER_S)
    assert [what for what, *_ in table.told] == ["joined"] * 4


def test_the_head_sends_heartbeats(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    for _ in range(10):
        table.send(worker.sealed(Heartbeat()))
        table.turn(HEARTBEAT_S / 2 + 0.01)
    assert worker.heard() == [Heartbeat()] * 5


@dataclass
class WalledLink:
    """A link that notes how long its callers were ready to wait; behind the wall nobody hears them."""

    inner: SendLink
    is_walled: bool = True
    timeouts_s: list[float] = field(default_factory=list)

    @property
    def peer(self) -> str:
        return self.inner.peer

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        self.timeouts_s.append(timeout_s)
        if self.is_walled:
            raise LinkTimeout("nobody hears")
        self.inner.send(parts, timeout_s)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def walls(table: Table) -> list[WalledLink]:
    """The links to all workers."""
    made: list[WalledLink] = []
    usual = table.dial

    def dial(address: str) -> SendLink:
        made.append(WalledLink(usual(address), is_walled=False))
        return made[-1]

    table.dial = dial
    return made


def test_workers_that_cannot_be_answered_do_not_hold_the_others_up(table: Table, walls: list[WalledLink]) -> None:
    """Each wait for one of them would be a time in which the others seem silent."""
    for index in range(5):
        worker = table.worker(f"behind a wall {index}")
        table.send(worker.hello_frame)
        worker.link.close()
    for _ in range(5):
        table.turn(HEARTBEAT_S / 2)
    assert [set(wall.timeouts_s) for wall in walls] == [{0.0}] * 5


def test_workers_that_cannot_be_reached_any_more_do_not_hold_the_others_up(
    table: Table, walls: list[WalledLink]
) -> None:
    workers = [table.worker(f"node-{index}") for index in range(5)]
    for worker in workers:
        worker.join()
    for wall in walls:
        wall.is_walled = True
        wall.timeouts_s.clear()
    for _ in range(4):
        table.turn(HEARTBEAT_S + 0.01)
    assert [wall.timeouts_s for wall in walls] == [[0.0] * 4] * 5


def test_a_node_is_lost_once_whoever_notices_it_first(
    table: Table, walls: list[WalledLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one is lost makes the driver plan again, and tell the other, which it cannot reach."""
    lost: list[str] = []

    def lose(name: str, why: str) -> None:
        lost.append(name)
        for other in ("a", "b"):
            table.members.send(other, Release())

    for name in ("a", "b"):
        table.worker(name).join()
    table.members._listener = Listener(lambda facts: None, lose, lambda name, message: None, lambda name, times: None)
    for wall in walls:
        wall.is_walled = True
    table.turn(LOST_AFTER_S + 1)
    assert sorted(lost) == ["a", "b"]


def test_a_node_that_joins_again_while_its_loss_is_told_is_not_lost_by_that(
    table: Table, walls: list[WalledLink]
) -> None:
    """Another thread was to tell it something and could not."""
    told, listener = table.told, table.members._listener
    has_rejoined = threading.Event()
    worker = table.worker("a", node_id="me")
    worker.join()
    again = table.worker("a", node_id="me")
    again.knock()
    again.take_answer()
    table.send(again.sealed(Heartbeat()))
    rejoining = threading.Thread(target=table.turn)

    def lost(name: str, why: str) -> None:
        rejoining.start()
        has_rejoined.wait(0.1)  # it has not, unless the order is wrong
        listener.lost(name, why)

    def joined(facts: PeerFacts) -> None:
        listener.joined(facts)
        has_rejoined.set()

    table.members._listener = replace(listener, lost=lost, joined=joined)
    walls[0].is_walled = True
    table.members.send("a", Release())
    rejoining.join()
    assert [what for what, *_ in told] == ["joined", "lost", "joined"]


# ---------------------------------------------------------------- messages


def test_what_a_worker_says_is_told_with_its_name(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    worker.say(Progress(EPOCH, 1, 2))
    assert table.told[-1] == ("told", "kitchen", Progress(EPOCH, 1, 2))


def test_orders_go_to_the_worker_of_that_name(table: Table) -> None:
    first, second = table.worker("a"), table.worker("b")
    first.join()
    second.join()
    table.members.send("b", Release())
    table.members.send("nobody", Release())
    assert (first.heard(), second.heard()) == ([], [Release()])


def test_a_worker_that_cannot_be_told_is_lost(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be waited for, for ever: it sends heartbeats, and knows of no order."""
    monkeypatch.setattr(membership, "SEND_TIMEOUT_S", 0.01)
    worker = table.worker("kitchen")
    worker.join()
    worker.link.close()
    table.members.send("kitchen", Release())
    (what, name, why) = table.told[-1]
    assert (what, name) == ("lost", "kitchen")
    assert "could not be reached" in str(why)
    worker.say(Heartbeat())
    assert len(table.told) == 2


def test_a_worker_that_leaves_is_lost_with_its_reason(table: Table) -> None:
    worker = table.worker("kitchen")
    worker.join()
    worker.say(Bye("stopped by its owner"))
    assert table.told[-1] == ("lost", "kitchen", "it left (stopped by its owner)")


def test_close_says_goodbye_to_everybody(table: Table) -> None:
    workers = [table.worker("a"), table.worker("b")]
    for worker in workers:
        worker.join()
    table.members.close("the server is stopping")
    assert [worker.heard()[-1] for worker in workers] == [Bye("the server is stopping")] * 2


def test_the_thread_ends_with_close() -> None:
    table = Table()
    table.members.start()
    worker = table.worker("kitchen")
    table.send(worker.hello_frame)
    welcome = control.open_answer(worker.link.receive(10), worker.hello, SECRET)
    assert welcome.name == "kitchen"
    table.members.close("bye")
    assert not table.members._thread.is_alive()
    table.members.close("bye again")
