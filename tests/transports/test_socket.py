"""What is special to sockets: frames as bytes, peers that lie or die; and to unix sockets: their files."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prima_core.errors import LinkBroken, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink
from prima_socket import plugin
from prima_socket.unix import UnixTransport

LONG_S = 10.0
SHORT_S = 0.05
NOBODY = Credentials()
LIMITS = Limits(max_message_bytes=1_000_000, max_queued=2)


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(exits: ExitStack, address: str = "unix://", limits: Limits = LIMITS) -> ReceiveLink:
    link = UnixTransport().listen(address, NOBODY, limits)
    exits.callback(link.close)
    return link


def dial(exits: ExitStack, address: str) -> SendLink:
    link = UnixTransport().dial(address, NOBODY, LIMITS)
    exits.callback(link.close)
    return link


def path_of(link: ReceiveLink) -> Path:
    return Path(link.address.removeprefix("unix://"))


def connect(exits: ExitStack, link: ReceiveLink) -> socket.socket:
    raw = exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))  # type: ignore[attr-defined,unused-ignore]
    raw.settimeout(LONG_S)
    raw.connect(str(path_of(link)))
    return raw


def framed(message: bytes) -> bytes:
    return struct.pack("<Q", len(message)) + message


def take(link: ReceiveLink) -> bytes:
    return bytes(link.receive(LONG_S))


def send_much(sender: SendLink) -> None:
    for _ in range(20):  # more than the system's buffer and the queue hold
        sender.send([bytes(1_000_000)], SHORT_S)


def nothing_comes(link: ReceiveLink) -> None:
    with pytest.raises(LinkTimeout):
        link.receive(SHORT_S)


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("size", [1_000_001, 2**63, 2**64 - 1])
def test_a_length_over_the_limit_ends_that_peer_alone(
    exits: ExitStack, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    link = listen(exits)
    good, hostile = connect(exits, link), connect(exits, link)
    good.sendall(framed(b"hello")[:9])
    hostile.sendall(struct.pack("<Q", size) + b"x")
    nothing_comes(link)
    with pytest.raises(ConnectionError):
        hostile.sendall(b"more")
    assert f"announced {size} bytes" in caplog.text
    good.sendall(b"ello")
    assert take(link) == b"hello"


def test_a_frame_may_come_byte_by_byte(exits: ExitStack) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    for byte in framed(b"abc")[:-1]:
        raw.sendall(bytes([byte]))
        with pytest.raises(LinkTimeout):
            link.receive(0.0)
    raw.sendall(b"c" + framed(b"") + framed(b"next"))
    assert [bytes(link.receive(LONG_S)) for _ in range(3)] == [b"abc", b"", b"next"]


def test_the_frame_of_a_sender_is_its_length_and_its_bytes(exits: ExitStack) -> None:
    with tempfile.TemporaryDirectory(prefix="prima-") as folder, socket.socket(socket.AF_UNIX) as server:  # type: ignore[attr-defined,unused-ignore]
        server.bind(f"{folder}/s")
        server.listen()
        sender = dial(exits, f"unix://{folder}/s")
        sender.send([b"a"] * 100, LONG_S)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1000) == framed(b"a" * 100)


def test_a_peer_that_dies_inside_a_message_gives_none(exits: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    link = listen(exits)
    raw = connect(exits, link)
    raw.sendall(framed(b"whole") + framed(b"torn")[:-1])
    raw.close()
    assert take(link) == b"whole"
    nothing_comes(link)
    assert "inside a message" in caplog.text
    dial(exits, link.address).send([b"successor"], LONG_S)
    assert take(link) == b"successor"


def test_a_peer_that_leaves_in_order_is_not_complained_of(exits: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    link = listen(exits)
    connect(exits, link).close()
    nothing_comes(link)
    assert caplog.text == ""


def test_half_messages_of_two_peers_do_not_mix(exits: ExitStack) -> None:
    link = listen(exits)
    one, two = connect(exits, link), connect(exits, link)
    first, second = framed(b"1" * 1000), framed(b"2" * 1000)
    for start in range(0, len(first), 100):
        one.sendall(first[start : start + 100])
        two.sendall(second[start : start + 100])
        if start + 100 < len(first):
            with pytest.raises(LinkTimeout):
                link.receive(0.0)
    assert sorted(bytes(link.receive(LONG_S)) for _ in range(2)) == [b"1" * 1000, b"2" * 1000]


def test_a_busy_peer_starves_no_other(exits: ExitStack) -> None:
    link = listen(exits)
    busy, quiet = connect(exits, link), connect(exits, link)
    for raw in (busy, quiet):  # both are let in
        raw.sendall(framed(b"here"))
        assert take(link) == b"here"
    busy.sendall(framed(b"busy") * 100)
    quiet.sendall(framed(b"quiet"))
    assert b"quiet" in [bytes(link.receive(LONG_S)) for _ in range(4)]


# ---------------------------------------------------------------- a slow reader, and one that dies


def test_what_waits_for_a_dead_reader_is_lost_with_it_and_no_torn_message_reaches_the_successor(
    exits: ExitStack,
) -> None:
    first = listen(exits)
    sender = dial(exits, first.address)
    with pytest.raises(LinkTimeout):
        send_much(sender)
    assert first.receive(LONG_S).nbytes == 1_000_000
    first.close()
    exits.callback(Path(first.address.removeprefix("unix://")).parent.rmdir)  # asked for by name: not the link's own
    second = listen(exits, first.address)
    messages: list[bytes] = []
    while b"for the successor" not in messages:
        sender.send([b"for the successor"], LONG_S)
        try:
            messages.append(bytes(second.receive(SHORT_S)))
        except LinkTimeout:
            continue
    assert messages == [b"for the successor"]


def test_a_reader_that_does_not_read_is_told_from_one_that_is_not_there(exits: ExitStack) -> None:
    link = listen(exits)
    sender = dial(exits, link.address)
    with pytest.raises(LinkTimeout, match="does not read"):
        send_much(sender)
    with pytest.raises(LinkTimeout, match="No such file") as caught:
        dial(exits, f"{link.address}-not").send([b"x"], 0.0)
    assert "is it running" in caught.value.hint


# ---------------------------------------------------------------- files


def test_a_fresh_socket_lies_in_a_private_folder_and_goes_with_the_link(exits: ExitStack) -> None:
    link = listen(exits)
    file = path_of(link)
    assert file.is_socket()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    link.close()
    assert not file.parent.exists()


def test_the_file_of_a_dead_process_is_replaced_and_that_of_a_living_one_is_not(
    exits: ExitStack, tmp_path: Path
) -> None:
    file = tmp_path / "ring"
    with socket.socket(socket.AF_UNIX) as living:  # type: ignore[attr-defined,unused-ignore]
        living.bind(str(file))
        living.listen()
        with pytest.raises(LinkBroken, match="in use"):
            listen(exits, f"unix://{file}")
    assert file.is_socket()
    link = listen(exits, f"unix://{file}")
    dial(exits, link.address).send([b"hello"], LONG_S)
    assert take(link) == b"hello"
    link.close()
    assert not file.exists()


def test_a_file_that_is_no_socket_and_a_folder_open_to_others_are_refused(exits: ExitStack, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    with pytest.raises(LinkBroken, match="not a socket"):
        listen(exits, f"unix://{diary}")
    assert diary.read_text() == "dear diary"
    tmp_path.chmod(0o755)
    with pytest.raises(LinkBroken, match="other users"):
        listen(exits, f"unix://{tmp_path}/ring")


def test_a_path_that_can_be_no_socket_is_refused_on_both_sides(exits: ExitStack, tmp_path: Path) -> None:
    for path in (f"{tmp_path}/{'x' * 108}", f"{tmp_path}/a\0b"):
        for use in (listen, dial):
            with pytest.raises(LinkBroken):
                use(exits, f"unix://{path}")


def test_a_closed_link_leaves_no_open_file(exits: ExitStack) -> None:
    before = len(os.listdir("/dev/fd"))
    link = listen(exits)
    sender = dial(exits, link.address)
    sender.send([bytes(1_000_000)], LONG_S)
    link.receive(LONG_S)
    sender.close()
    link.close()
    assert len(os.listdir("/dev/fd")) == before


def test_a_process_that_forgets_to_close_ends_cleanly_and_leaves_no_file(exits: ExitStack) -> None:
    link = listen(exits)
    code = (
        "import sys, threading; from prima_core.interfaces import *; from prima_socket.unix import UnixTransport\n"
        "link = UnixTransport().listen('unix://', Credentials(), Limits())\n"
        "threading.excepthook = lambda _: None  # LinkClosed ends it\n"
        "threading.Thread(target=link.receive, args=(60,), daemon=True).start()\n"
        "sender = UnixTransport().dial(sys.argv[1], Credentials(), Limits())\n"
        "sender.send([link.address.encode()], 10)"
    )
    path = ":".join(entry for entry in sys.path if entry)
    subprocess.run([sys.executable, "-c", code, link.address], check=True, env={"PYTHONPATH": path}, timeout=LONG_S)
    address = str(link.receive(LONG_S), "ascii")
    assert not Path(address.removeprefix("unix://")).parent.exists()


def test_windows_is_offered_tcp_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [offer.scheme for offer in plugin.prima_transports()] == ["unix", "tcp"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert [offer.scheme for offer in plugin.prima_transports()] == ["tcp"]
