"""What every transport of ours has to do, whatever carries it."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import pytest

from prima_core.errors import LinkBroken, LinkClosed, LinkError, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink, Transport
from prima_inproc.transport import InprocTransport
from prima_nng.transport import NngTransport
from prima_socket.tcp import TcpTransport
from prima_socket.unix import UnixTransport

LONG_S = 10.0
SHORT_S = 0.05
LIMITS = Limits()
CREDENTIALS = Credentials(b"s" * 32)


@dataclass(frozen=True)
class Network:
    """A transport, an address to listen at, and everything opened on it, closed at the end."""

    transport: Transport
    free_address: str
    exits: ExitStack

    def listen(self, address: str = "", limits: Limits = LIMITS) -> ReceiveLink:
        link = self.transport.listen(address or self.free_address, CREDENTIALS, limits)
        self.exits.callback(link.close)
        return link

    def dial(self, address: str, limits: Limits = LIMITS) -> SendLink:
        link = self.transport.dial(address, CREDENTIALS, limits)
        self.exits.callback(link.close)
        return link


@pytest.fixture(params=["inproc", "unix", "tcp", "ipc", "tls+tcp"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    scheme = request.param
    own: dict[str, Callable[[], Transport]] = {"inproc": InprocTransport, "unix": UnixTransport, "tcp": TcpTransport}
    transport = own[scheme]() if scheme in own else NngTransport(scheme)
    free_address = f"{scheme}://127.0.0.1:0" if "tcp" in scheme else f"{scheme}://"
    with ExitStack() as exits:  # sockets in a folder of the test's own, with a shorter path than `tmp_path`
        monkeypatch.setattr(tempfile, "tempdir", exits.enter_context(tempfile.TemporaryDirectory(prefix="prima-")))
        yield Network(transport, free_address, exits)


def take(link: ReceiveLink) -> bytes:
    return bytes(link.receive(LONG_S))


def poll(receive: Callable[[], memoryview]) -> bytes:
    """Try until a message comes."""
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        with suppress(LinkTimeout):
            return bytes(receive())
    raise AssertionError("no message came")


def in_thread(work: Callable[[], object]) -> Callable[[], LinkError | None]:
    """Start `work`; the returned function joins it and gives the link error that it ended with."""
    ended: list[LinkError] = []
    started = threading.Event()

    def main() -> None:
        started.set()
        try:
            work()
        except LinkError as error:
            ended.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    started.wait()

    def join() -> LinkError | None:
        thread.join(LONG_S)
        assert not thread.is_alive()
        return ended[0] if ended else None

    return join


def test_parts_arrive_as_one_unchanged_message(network: Network) -> None:
    receiver = network.listen()
    sender = network.dial(receiver.address)
    floats = np.arange(1000, dtype=np.float32)
    sender.send([b"head", bytearray(b"er"), floats.data, b""], LONG_S)
    assert bytes(receiver.receive(LONG_S)) == b"header" + floats.tobytes()


def test_an_empty_message_arrives(network: Network) -> None:
    receiver = network.listen()
    network.dial(receiver.address).send([], LONG_S)
    assert receiver.receive(LONG_S).nbytes == 0


def test_a_message_outlives_its_link(network: Network) -> None:
    receiver = network.listen()
    network.dial(receiver.address).send([b"x" * 100_000], LONG_S)
    message = np.frombuffer(receiver.receive(LONG_S), np.uint8)
    receiver.close()
    assert (message == ord("x")).all()


def test_a_message_is_read_only(network: Network) -> None:
    receiver = network.listen()
    network.dial(receiver.address).send([b"abc"], LONG_S)
    assert receiver.receive(LONG_S).readonly


def test_large_messages_arrive_whole(network: Network) -> None:
    receiver = network.listen()
    sender = network.dial(receiver.address)
    data = np.random.default_rng(0).bytes(5_000_000)
    join = in_thread(lambda: sender.send([data[:1], data[1:]], LONG_S))
    assert take(receiver) == data
    assert join() is None


def test_each_peers_messages_keep_their_order(network: Network) -> None:
    receiver = network.listen()
    senders = [network.dial(receiver.address) for _ in range(3)]

    def send(index: int) -> None:
        for number in range(200):
            senders[index].send([bytes([index]), number.to_bytes(2, "little")], LONG_S)

    joins = [in_thread(lambda index=index: send(index)) for index in range(3)]  # type: ignore[misc]  # mypy cannot
    messages = [bytes(receiver.receive(LONG_S)) for _ in range(600)]
    assert [join() for join in joins] == [None] * 3
    for index in range(3):
        numbers = [int.from_bytes(message[1:], "little") for message in messages if message[0] == index]
        assert numbers == list(range(200))


def test_the_bound_address_is_complete(network: Network) -> None:
    first, second = network.listen(), network.listen()
    assert first.address != second.address
    assert not first.address.endswith((":0", "//"))
    sender = network.dial(second.address)
    assert sender.peer == second.address
    sender.send([b"for the second"], LONG_S)
    assert take(second) == b"for the second"


@pytest.mark.parametrize("timeout_s", [0.0, SHORT_S, 0.12])
def test_receive_without_a_message_times_out_in_time(network: Network, timeout_s: float) -> None:
    receiver = network.listen()
    start = time.monotonic()
    with pytest.raises(LinkTimeout):
        receiver.receive(timeout_s)
    assert timeout_s <= time.monotonic() - start < timeout_s + 2.0


def test_receive_with_no_time_takes_what_is_there(network: Network) -> None:
    receiver = network.listen()
    sender = network.dial(receiver.address)
    sender.send([b"one"], LONG_S)
    sender.send([b"two"], LONG_S)
    assert take(receiver) == b"one"
    assert poll(lambda: receiver.receive(0.0)) == b"two"


def test_send_without_a_peer_times_out_and_sends_nothing(network: Network) -> None:
    receiver = network.listen()
    address = receiver.address
    receiver.close()
    sender = network.dial(address)
    with pytest.raises(LinkTimeout):
        sender.send([b"lost"], SHORT_S)
    receiver = network.listen(address)
    sender.send([b"kept"], LONG_S)
    assert take(receiver) == b"kept"


def test_the_peer_may_come_later(network: Network) -> None:
    receiver = network.listen()
    address = receiver.address
    receiver.close()
    sender = network.dial(address)
    join = in_thread(lambda: sender.send([b"early"], LONG_S))
    receiver = network.listen(address)
    assert take(receiver) == b"early"
    assert join() is None


def test_a_successor_at_the_same_address_takes_over(network: Network) -> None:
    first = network.listen()
    sender = network.dial(first.address)
    sender.send([b"first"], LONG_S)
    assert take(first) == b"first"
    first.close()
    second = network.listen(first.address)

    def send_and_receive() -> memoryview:
        sender.send([b"again"], SHORT_S)  # one that hits the dead peer may be lost
        return second.receive(SHORT_S)

    assert poll(send_and_receive) == b"again"


def test_a_reader_that_does_not_read_holds_the_sender_up_and_loses_nothing(network: Network) -> None:
    limits = Limits(max_queued=2)
    receiver = network.listen(limits=limits)
    sender = network.dial(receiver.address, limits)
    block = bytes(500_000)
    sender.send([bytes(4), block], LONG_S)
    sent = 1
    with suppress(LinkTimeout):
        while sent < 200:
            sender.send([sent.to_bytes(4, "little"), block], SHORT_S)
            sent += 1
    assert limits.max_queued <= sent < 200
    numbers = [int.from_bytes(receiver.receive(LONG_S)[:4], "little") for _ in range(sent)]
    assert numbers == list(range(sent))
    with pytest.raises(LinkTimeout):
        receiver.receive(SHORT_S)


def test_a_ring_of_queues_takes_its_credit_without_a_reader(network: Network) -> None:
    receiver = network.listen(limits=Limits(max_queued=8))
    sender = network.dial(receiver.address, Limits(max_queued=8))
    for _ in range(8):
        sender.send([bytes(1_000_000)], LONG_S)
    assert all(receiver.receive(LONG_S).nbytes == 1_000_000 for _ in range(8))


def test_a_message_over_the_limit_is_refused_and_the_link_lives(network: Network) -> None:
    limits = Limits(max_message_bytes=1000)
    receiver = network.listen(limits=limits)
    sender = network.dial(receiver.address, limits)
    with pytest.raises(LinkBroken, match="1001 bytes"):
        sender.send([b"x" * 1001], LONG_S)
    sender.send([b"x" * 1000], LONG_S)
    assert receiver.receive(LONG_S).nbytes == 1000


def test_closed_links_raise(network: Network) -> None:
    receiver = network.listen()
    sender = network.dial(receiver.address)
    for link in (receiver, sender, receiver, sender):
        link.close()
    with pytest.raises(LinkClosed):
        receiver.receive(LONG_S)
    with pytest.raises(LinkClosed):
        sender.send([b"x"], LONG_S)


def test_a_message_sent_before_close_arrives(network: Network) -> None:
    receiver = network.listen()
    for number in range(10):
        sender = network.dial(receiver.address)
        sender.send([b"last words"], LONG_S)
        sender.send([bytes([number])], LONG_S)
        sender.close()
        assert take(receiver) == b"last words"
        assert take(receiver) == bytes([number])


def test_close_ends_a_waiting_receive(network: Network) -> None:
    for _ in range(10):
        receiver = network.listen()
        join = in_thread(lambda receiver=receiver: receiver.receive(LONG_S))  # type: ignore[misc]  # mypy cannot
        receiver.close()
        assert isinstance(join(), LinkClosed)


def test_close_ends_a_waiting_send(network: Network) -> None:
    receiver = network.listen()
    receiver.close()
    sender = network.dial(receiver.address)
    join = in_thread(lambda: sender.send([b"x"], LONG_S))
    sender.close()
    assert isinstance(join(), LinkClosed)


def test_close_in_the_middle_of_traffic_ends_both_sides(network: Network) -> None:
    for _ in range(5):
        receiver = network.listen()
        sender = network.dial(receiver.address)

        def send_on(sender: SendLink = sender) -> None:
            while True:
                sender.send([bytes(10_000)], LONG_S)

        def receive_on(receiver: ReceiveLink = receiver) -> None:
            while True:
                receiver.receive(LONG_S)

        joins = [in_thread(send_on), in_thread(receive_on)]
        receiver.close()
        sender.close()
        assert all(isinstance(join(), LinkClosed) for join in joins)


def test_a_taken_address_is_refused_with_a_hint(network: Network) -> None:
    receiver = network.listen()
    with pytest.raises(LinkBroken) as caught:
        network.listen(receiver.address)
    assert "choose another" in caught.value.hint
    network.dial(receiver.address).send([b"still here"], LONG_S)
    assert take(receiver) == b"still here"


def test_an_address_of_another_scheme_is_refused(network: Network) -> None:
    with pytest.raises(LinkBroken):
        network.listen("foo://127.0.0.1:0")
    with pytest.raises(LinkBroken):
        network.dial("foo://127.0.0.1:1")
    with pytest.raises(LinkBroken):
        network.dial(network.free_address)
