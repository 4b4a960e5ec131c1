"""What is nng's own: socket files, ports, keys, foreign peers (some of them nng's plain tcp), and how processes end."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prima_core.errors import LinkBroken, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink
from prima_nng.transport import NngTransport

LONG_S = 10.0
SHORT_S = 0.3
NOBODY = Credentials()
OURS = Credentials(b"o" * 32)
FOREIGN = Credentials(b"f" * 32)
LIMITS = Limits()


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(exits: ExitStack, address: str, credentials: Credentials = NOBODY, limits: Limits = LIMITS) -> ReceiveLink:
    link = NngTransport(address.partition(":")[0]).listen(address, credentials, limits)
    exits.callback(link.close)
    return link


def dial(exits: ExitStack, address: str, credentials: Credentials = NOBODY, limits: Limits = LIMITS) -> SendLink:
    link = NngTransport(address.partition(":")[0]).dial(address, credentials, limits)
    exits.callback(link.close)
    return link


def take(link: ReceiveLink) -> bytes:
    return bytes(link.receive(LONG_S))


def run_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that has said "ready"; to be killed or left to end."""
    lead = "import sys; from prima_nng.transport import NngTransport; from prima_core.interfaces import *\n"
    child = subprocess.Popen(
        [sys.executable, "-c", lead + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": path()},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def path() -> str:
    return ":".join(entry for entry in sys.path if entry)


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait(LONG_S)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.stdout.close()


# ---------------------------------------------------------------- ipc: files


def test_a_fresh_socket_lies_in_a_private_folder_and_goes_with_the_link(exits: ExitStack) -> None:
    link = listen(exits, "ipc://")
    file = Path(link.address.removeprefix("ipc://"))
    assert file.is_socket()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    link.close()
    assert not file.parent.exists()


def test_a_socket_at_a_given_path_is_removed_at_close_and_its_folder_made_private(
    exits: ExitStack, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "ring"
    link = listen(exits, f"ipc://{file}")
    assert link.address == f"ipc://{file}"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    link.close()
    assert not file.exists()
    assert file.parent.exists()


def test_the_socket_that_a_killed_process_left_is_replaced(exits: ExitStack, tmp_path: Path) -> None:
    file = tmp_path / "ring"
    child = run_child(
        "link = NngTransport('ipc').listen(sys.argv[1], Credentials(), Limits()); print('ready', flush=True)\n"
        "link.receive(60)",
        f"ipc://{file}",
    )
    with pytest.raises(LinkBroken, match="in use"):
        listen(exits, f"ipc://{file}")
    end(child)
    assert file.is_socket()
    link = listen(exits, f"ipc://{file}")
    dial(exits, link.address).send([b"hello"], LONG_S)
    assert take(link) == b"hello"


def test_a_file_that_is_no_socket_is_never_replaced(exits: ExitStack, tmp_path: Path) -> None:
    file = tmp_path / "diary"
    file.write_text("dear diary")
    with pytest.raises(LinkBroken, match="not a socket"):
        listen(exits, f"ipc://{file}")
    assert file.read_text() == "dear diary"


def test_a_folder_that_others_can_enter_is_refused(exits: ExitStack, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(LinkBroken, match="other users") as caught:
        listen(exits, f"ipc://{folder}/ring")
    assert f"chmod 700 {folder}" in caught.value.hint


def test_a_path_that_is_too_long_is_refused_on_both_sides(exits: ExitStack, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/{'x' * 108}"
    with pytest.raises(LinkBroken, match="bytes, the system allows"):
        listen(exits, address)
    with pytest.raises(LinkBroken, match="bytes, the system allows"):
        dial(exits, address)


def test_the_longest_path_that_is_allowed_works(
    exits: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    most = 103 if sys.platform == "darwin" else 107
    link = listen(exits, f"ipc://{'x' * (most - len(str(tmp_path)) - 1)}")
    assert len(link.address) == len("ipc://") + most
    dial(exits, link.address).send([b"hello"], LONG_S)
    assert take(link) == b"hello"


# ---------------------------------------------------------------- tls+tcp: addresses


@pytest.mark.parametrize("address", ["tls+tcp://127.0.0.1", "tls+tcp://127.0.0.1:99999", "tls+tcp://bad host:33"])
def test_a_malformed_address_is_refused_on_both_sides(exits: ExitStack, address: str) -> None:
    """nng itself takes port 99999 and blanks in silence."""
    for use in (listen, dial):
        with pytest.raises(LinkBroken):
            use(exits, address, OURS)


def test_an_address_of_another_computer_cannot_be_listened_at(exits: ExitStack) -> None:
    with pytest.raises(LinkBroken, match="cannot listen at"):
        listen(exits, "tls+tcp://192.0.2.1:0", OURS)


def test_ipv6_and_all_interfaces_work(exits: ExitStack) -> None:
    for address in ("tls+tcp://[::1]:0", "tls+tcp://0.0.0.0:0"):
        link = listen(exits, address, OURS)
        port = int(link.address.rpartition(":")[2])
        assert link.address == f"{address[:-2]}:{port}"
        dial(exits, link.address, OURS).send([b"hello"], LONG_S)
        assert take(link) == b"hello"


# ---------------------------------------------------------------- tls


def test_tls_without_a_token_is_refused_with_a_hint(exits: ExitStack) -> None:
    for use in (listen, dial):
        with pytest.raises(LinkBroken) as caught:
            use(exits, "tls+tcp://127.0.0.1:7747", NOBODY)
        assert "PRIMA_TOKEN" in caught.value.hint


def test_a_wrong_token_gets_no_message_through_and_the_sender_is_told(exits: ExitStack) -> None:
    link = listen(exits, "tls+tcp://127.0.0.1:0", OURS)
    stranger = dial(exits, link.address, FOREIGN)
    with pytest.raises(LinkTimeout) as caught:
        stranger.send([b"let me in"], SHORT_S)
    assert "token" in caught.value.hint
    plain = dial(exits, link.address.replace("tls+tcp", "tcp"), OURS)
    with pytest.raises(LinkTimeout):
        plain.send([b"let me in"], SHORT_S)
    with pytest.raises(LinkTimeout):
        link.receive(SHORT_S)
    dial(exits, link.address, OURS).send([b"hello"], LONG_S)
    assert take(link) == b"hello"


def test_a_tls_sender_sends_nothing_to_a_plain_listener(exits: ExitStack) -> None:
    link = listen(exits, "tcp://127.0.0.1:0", OURS)
    sender = dial(exits, link.address.replace("tcp", "tls+tcp", 1), OURS)
    with pytest.raises(LinkTimeout):
        sender.send([b"secret"], SHORT_S)
    with pytest.raises(LinkTimeout):
        link.receive(SHORT_S)


def test_a_tls_sender_says_nothing_in_the_clear(exits: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tap:
        sender = dial(exits, f"tls+tcp://127.0.0.1:{tap.getsockname()[1]}", OURS)
        with pytest.raises(LinkTimeout):
            sender.send([b"the secret message"], SHORT_S)
        connection, _ = tap.accept()
        with connection:
            first = connection.recv(4096)
    assert first[:2] == b"\x16\x03"  # a TLS handshake record, not nng's greeting


# ---------------------------------------------------------------- foreign and dying peers


def test_bytes_that_are_not_nng_hurt_nobody(exits: ExitStack) -> None:
    link = listen(exits, "tcp://127.0.0.1:0")
    port = int(link.address.rpartition(":")[2])
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\0SP\0" + b"\xff" * 100,
        b"\0SP\0\0\x50\0\0" + b"\xff" * 8,
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(garbage)
    dial(exits, link.address).send([b"hello"], LONG_S)
    assert take(link) == b"hello"


@pytest.mark.parametrize("scheme", ["ipc", "tls+tcp"])
def test_a_process_that_forgets_to_close_ends_cleanly(exits: ExitStack, scheme: str) -> None:
    """A thread inside nng while the process ends makes nng abort it; about every second time without our care."""
    link = listen(exits, "ipc://" if scheme == "ipc" else f"{scheme}://127.0.0.1:0", OURS)
    code = (
        "import threading\n"
        "transport, credentials = NngTransport(sys.argv[1]), Credentials(b'o' * 32)\n"
        "links = [transport.listen(sys.argv[2], credentials, Limits()) for _ in range(4)]\n"
        "for link in links: threading.Thread(target=link.receive, args=(60,), daemon=True).start()\n"
        "threading.excepthook = lambda _: None  # LinkClosed ends them\n"
        "sender = transport.dial(sys.argv[3], credentials, Limits())\n"
        "for link in links: sender.send([link.address.encode()], 10)\n"
        "print('ready', flush=True)"
    )
    child = run_child(code, scheme, "ipc://" if scheme == "ipc" else f"{scheme}://127.0.0.1:0", link.address)
    addresses = [str(link.receive(LONG_S), "ascii") for _ in range(4)]
    assert child.wait(LONG_S) == 0
    end(child)
    assert not any(Path(address.removeprefix("ipc://")).parent.exists() for address in addresses if scheme == "ipc")


def test_the_plugin_itself_loads_nothing_heavy() -> None:
    code = (
        "import sys, prima_nng.plugin as plugin, prima_inproc.plugin\n"
        "assert sorted(offer.scheme for offer in plugin.prima_transports()) == ['ipc', 'tls+tcp']\n"
        "assert not {'pynng', 'numpy', 'msgspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path()}, timeout=LONG_S)
