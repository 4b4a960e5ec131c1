"""What is special to plain tcp: who is let in, what strangers can do, options and addresses."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from prima_core.errors import LinkBroken, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink
from prima_core.ring.security import proof
from prima_socket import doorman
from prima_socket.receive import SocketReceiveLink
from prima_socket.tcp import TcpSendLink, TcpTransport

LONG_S = 10.0
SHORT_S = 0.2
SECRET = b"o" * 32
OURS = Credentials(SECRET)
FOREIGN = Credentials(b"f" * 32)
LIMITS = Limits(max_message_bytes=1_000_000, max_queued=2)
HELLO = b"primatcp" + b"n" * 32


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(exits: ExitStack, address: str = "tcp://127.0.0.1:0", credentials: Credentials = OURS) -> SocketReceiveLink:
    link = TcpTransport().listen(address, credentials, LIMITS)
    exits.callback(link.close)
    return link


def dial(exits: ExitStack, address: str, credentials: Credentials = OURS) -> TcpSendLink:
    link = TcpTransport().dial(address, credentials, LIMITS)
    exits.callback(link.close)
    return link


def take(link: ReceiveLink) -> bytes:
    return bytes(link.receive(LONG_S))


def nothing_comes(link: ReceiveLink) -> None:
    with pytest.raises(LinkTimeout):
        link.receive(SHORT_S)


def a_friend_gets_through(exits: ExitStack, link: ReceiveLink) -> None:
    dial(exits, link.address).send([b"hello"], LONG_S)
    assert take(link) == b"hello"


def connect(exits: ExitStack, link: ReceiveLink) -> socket.socket:
    port = int(link.address.rpartition(":")[2])
    return exits.enter_context(socket.create_connection(("127.0.0.1", port), LONG_S))


def read(raw: socket.socket, n_bytes: int) -> bytes:
    """As many bytes, or those until the end."""
    data = b""
    with suppress(ConnectionError):
        while len(data) < n_bytes and (more := raw.recv(n_bytes - len(data))):
            data += more
    return data


def is_hung_up(raw: socket.socket) -> bool:
    return read(raw, 1) == b""


def prove(raw: socket.socket, hello: bytes = HELLO, secret: bytes = SECRET) -> bytes:
    """The dialer's part, by the letter of the protocol; gives what the listener said."""
    raw.sendall(hello)
    their_hello = read(raw, 40)
    raw.sendall(proof(secret, "tcp dialer", hello, their_hello))
    return their_hello + read(raw, 32)


def refusal(sender: TcpSendLink) -> str:
    """What the sender is told when its first attempt is over."""
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        with pytest.raises(LinkTimeout) as caught:
            sender.send([b"let me in"], SHORT_S)
        if "no answer yet" not in str(caught.value):
            break
    return str(caught.value)


class Impostor:
    """Listens like a node and answers as `talk` does; `heard` is all that was said to it."""

    def __init__(self, exits: ExitStack, talk: Callable[[socket.socket], None]) -> None:
        self._server = exits.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._talk = talk
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.has_met = threading.Event()
        thread = threading.Thread(target=self._main, daemon=True)
        thread.start()
        exits.callback(thread.join, LONG_S)

    def _main(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            connection.settimeout(LONG_S)
            self._talk(connection)
            self.has_met.set()


# ---------------------------------------------------------------- the handshake


def test_the_protocol_is_as_described_and_what_follows_is_plain(exits: ExitStack) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    said = prove(raw)
    assert said[:8] == b"primatcp"
    assert said[40:] == proof(SECRET, "tcp listener", said[:40], HELLO)
    raw.sendall(struct.pack("<Q", 5) + b"hello")
    assert take(link) == b"hello"


def test_a_handshake_may_come_byte_by_byte(exits: ExitStack) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    their_hello = read(raw, 40)
    for byte in HELLO + proof(SECRET, "tcp dialer", HELLO, their_hello):
        raw.sendall(bytes([byte]))
    assert read(raw, 32) == proof(SECRET, "tcp listener", their_hello, HELLO)
    raw.sendall(struct.pack("<Q", 5) + b"hello")
    assert take(link) == b"hello"


def test_each_connection_has_a_nonce_of_its_own(exits: ExitStack) -> None:
    link = listen(exits)
    assert len({read(connect(exits, link), 40) for _ in range(5)}) == 5


def test_without_a_token_nothing_opens(exits: ExitStack) -> None:
    for use in (listen, dial):
        with pytest.raises(LinkBroken, match="token") as caught:
            use(exits, "tcp://127.0.0.1:7747", Credentials())
        assert "PRIMA_TOKEN" in caught.value.hint


def test_who_has_another_token_is_told_so(exits: ExitStack) -> None:
    link = listen(exits)
    told = refusal(dial(exits, link.address, FOREIGN))
    assert told.startswith(f"no connection to {link.address} within")
    assert "it hung up: does it have the same token?" in told
    nothing_comes(link)


# ---------------------------------------------------------------- strangers who dial


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\x02\x00", HELLO + b"p" * 32, b"primatcq" + bytes(64)],
    ids=["http", "zeros", "tls", "a proof out of the air", "another version"],
)
def test_a_stranger_is_hung_up_on_and_hears_no_proof(exits: ExitStack, garbage: bytes) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    raw.sendall(garbage)
    with suppress(OSError):  # hung up on already
        raw.shutdown(socket.SHUT_WR)
    assert len(read(raw, 1000)) <= 40
    a_friend_gets_through(exits, link)


def test_what_is_sent_along_with_a_wrong_proof_is_no_message(exits: ExitStack) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    raw.sendall(HELLO + b"p" * 32 + struct.pack("<Q", 5) + b"hello")
    nothing_comes(link)


def test_who_says_too_little_is_hung_up_on_in_time(exits: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman, "_PROVE_WITHIN_S", SHORT_S)
    link = listen(exits)
    silent, half, slow = (connect(exits, link) for _ in range(3))
    half.sendall(HELLO[:39])
    slow.sendall(HELLO)
    for raw in (silent, half, slow):
        assert len(read(raw, 1000)) == 40
    a_friend_gets_through(exits, link)


def test_many_who_say_nothing_keep_nobody_out(exits: ExitStack) -> None:
    link = listen(exits)
    silent = [connect(exits, link) for _ in range(100)]
    a_friend_gets_through(exits, link)
    for raw in silent[:30]:  # the oldest had to go
        assert len(read(raw, 1000)) == 40
    silent[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        read(silent[-1], 1000)


def test_more_friends_than_may_wait_all_get_in(exits: ExitStack) -> None:
    link = listen(exits)
    friends = [dial(exits, link.address) for _ in range(80)]
    for number, friend in enumerate(friends):
        friend.send([bytes([number])], LONG_S)
    assert {take(link) for _ in friends} == {bytes([number]) for number in range(80)}


def test_a_recorded_handshake_opens_nothing(exits: ExitStack) -> None:
    link = listen(exits)
    recorder = connect(exits, link)
    hello = read(recorder, 40)
    recorded = HELLO + proof(SECRET, "tcp dialer", HELLO, hello)
    recorder.sendall(recorded)
    assert len(read(recorder, 32)) == 32
    replay = connect(exits, link)
    replay.sendall(recorded + struct.pack("<Q", 5) + b"again")
    assert len(read(replay, 1000)) <= 40
    nothing_comes(link)


def test_a_listeners_own_words_do_not_open_it(exits: ExitStack) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    hello = read(raw, 40)
    raw.sendall(hello)
    raw.sendall(proof(SECRET, "tcp listener", hello, hello))
    assert is_hung_up(raw)
    nothing_comes(link)


def test_a_friend_who_announces_too_much_is_dropped_alone(exits: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    link = listen(exits)
    for size in (1_000_001, 2**63, 2**64 - 1):
        raw = connect(exits, link)
        prove(raw)
        raw.sendall(struct.pack("<Q", size) + b"x")
        nothing_comes(link)
        assert is_hung_up(raw)
        assert f"announced {size} bytes" in caplog.text
    a_friend_gets_through(exits, link)


def test_strangers_do_not_fill_the_log(exits: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    link = listen(exits)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            connect(exits, link).sendall(b"GET / HTTP/1.1\r\n\r\n")
        a_friend_gets_through(exits, link)
    assert caplog.text == ""


def test_a_listener_without_free_file_numbers_goes_on_later(
    exits: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link, accept, failures = listen(exits), socket.socket.accept, [1, 1]

    def full(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", full)
    a_friend_gets_through(exits, link)
    assert "ulimit -n" in caplog.text


def test_a_listener_whose_system_can_watch_no_more_goes_on_later(
    exits: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, failures = listen(exits), [1, 1]
    register = selectors.DefaultSelector.register

    def full(self: selectors.DefaultSelector, *watched: Any) -> selectors.SelectorKey:  # Any: passed on
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return register(self, *watched)

    monkeypatch.setattr(selectors.DefaultSelector, "register", full)
    a_friend_gets_through(exits, link)
    assert not failures


# ---------------------------------------------------------------- strangers who are dialled


def test_an_impostor_hears_no_message(exits: ExitStack) -> None:
    heard: list[bytes] = []

    def talk(raw: socket.socket) -> None:
        raw.sendall(HELLO)
        heard.append(read(raw, 72))
        raw.sendall(b"p" * 32)
        heard.append(read(raw, 1000))

    impostor = Impostor(exits, talk)
    with pytest.raises(LinkTimeout, match="no connection to"):
        dial(exits, impostor.address).send([b"the secret message"], SHORT_S)
    assert impostor.has_met.wait(LONG_S)
    assert [len(said) for said in heard] == [72, 0]


def test_a_mirror_is_no_peer(exits: ExitStack) -> None:
    def talk(raw: socket.socket) -> None:
        raw.sendall(read(raw, 40))
        raw.sendall(read(raw, 32))

    impostor = Impostor(exits, talk)
    assert "does not know the cluster's token" in refusal(dial(exits, impostor.address))
    assert impostor.has_met.wait(LONG_S)


def test_a_recorded_listener_is_no_peer(exits: ExitStack) -> None:
    said = prove(connect(exits, listen(exits)))
    impostor = Impostor(exits, lambda raw: raw.sendall(said))
    with pytest.raises(LinkTimeout):
        dial(exits, impostor.address).send([b"x"], SHORT_S)
    assert impostor.has_met.wait(LONG_S)


def test_a_server_of_another_kind_is_named_as_such(exits: ExitStack) -> None:
    impostor = Impostor(exits, lambda raw: raw.sendall(b"220 mail.example ESMTP\r\n"))
    assert "it speaks something else" in refusal(dial(exits, impostor.address))


def test_who_takes_the_connection_and_says_nothing_is_waited_for_no_longer_than_asked(exits: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = dial(exits, f"tcp://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(LinkTimeout, match="no answer yet") as caught:
            sender.send([b"x"], SHORT_S)
        sender.close()
        assert "same token" in caught.value.hint


# ---------------------------------------------------------------- connections


def test_both_ends_send_at_once_and_ask_after_a_silent_peer(exits: ExitStack) -> None:
    link = listen(exits)
    sender = dial(exits, link.address)
    sender.send([b"x"], LONG_S)
    take(link)
    [peer] = link._peers
    assert sender._socket is not None
    for end in (sender._socket, peer.connection):
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_no_message_is_lost_to_a_peer_that_has_hung_up(exits: ExitStack) -> None:
    for _ in range(10):
        first = listen(exits)
        sender = dial(exits, first.address)
        sender.send([b"one"], LONG_S)
        assert take(first) == b"one"
        first.close()
        with pytest.raises(LinkTimeout):
            sender.send([b"lost"], 0.0)
        second = listen(exits, first.address)
        sender.send([b"two"], LONG_S)
        assert take(second) == b"two"


def test_a_system_without_sendmsg_sends_the_same(exits: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    link = listen(exits)
    sender = dial(exits, link.address)
    monkeypatch.setattr(sys, "platform", "win32")
    sender.send([b"head", bytearray(b"er"), memoryview(b"end")], LONG_S)
    assert take(link) == b"headerend"


def test_a_closed_link_leaves_no_open_file(exits: ExitStack) -> None:
    before = len(os.listdir("/dev/fd"))
    link = listen(exits)
    connect(exits, link).close()
    sender = dial(exits, link.address)
    sender.send([bytes(1_000_000)], LONG_S)
    link.receive(LONG_S)
    unproven = connect(exits, link)
    assert len(read(unproven, 40)) == 40
    sender.close()
    link.close()
    assert is_hung_up(unproven)
    unproven.close()
    assert len(os.listdir("/dev/fd")) == before


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://:80",
        "tcp://h:80x",
        "tcp://bad host:33",
        "tcp://bad\nhost:33",
        "tcp://h:1/path",
        "tcp://h:1?query",
        "tcp://user@h:1",
        "tcp://[",
        "tcp://[::1",
    ],
)
def test_a_malformed_address_is_refused_on_both_sides(exits: ExitStack, address: str) -> None:
    for use in (listen, dial):
        with pytest.raises(LinkBroken) as caught:
            use(exits, address)
        assert "tcp://192.168.1.5:7747" in caught.value.hint


@pytest.mark.parametrize("host", ["[::1]", "localhost", "0.0.0.0", "[::]"])
def test_hosts_are_names_or_literals(exits: ExitStack, host: str) -> None:
    link = listen(exits, f"tcp://{host}:0")
    port = int(link.address.rpartition(":")[2])
    assert link.address == f"tcp://{host}:{port}"
    a_friend_gets_through(exits, link)


def test_a_star_is_every_interface(exits: ExitStack) -> None:
    link = listen(exits, "tcp://*:0")
    assert link.address.startswith("tcp://0.0.0.0:")
    a_friend_gets_through(exits, link)


def test_every_interface_of_ipv6_is_of_ipv4_too(exits: ExitStack) -> None:
    link = listen(exits, "tcp://[::]:0")
    sender = dial(exits, link.address.replace("[::]", "127.0.0.1"))
    sender.send([b"hello"], LONG_S)
    assert take(link) == b"hello"


@pytest.mark.parametrize(
    ("address", "says", "hint"),
    [
        ("tcp://192.0.2.1:0", "cannot listen at tcp://192.0.2.1:0", "no such address"),
        ("tcp://no..host:0", "can be no host's name", "check the host"),
    ],
)
def test_a_place_that_is_not_here_cannot_be_listened_at(exits: ExitStack, address: str, says: str, hint: str) -> None:
    with pytest.raises(LinkBroken, match=says) as caught:
        listen(exits, address)
    assert hint in caught.value.hint


def test_a_name_that_nobody_has_is_told_with_the_timeout(exits: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in refusal(dial(exits, "tcp://attic.example:7747"))


def test_a_name_whose_first_address_is_dead_is_reached_by_the_next(
    exits: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = listen(exits)
    port = int(link.address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = probe.getsockname()
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*stream, dead), (*stream, ("127.0.0.1", port))])
    dial(exits, "tcp://attic.example:7747").send([b"hello"], LONG_S)
    assert take(link) == b"hello"
