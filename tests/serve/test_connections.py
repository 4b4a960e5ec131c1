"""Connections that ask for nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from prima_core.serve import connections
from tests.serve.fakes import FakeService
from tests.serve.live import serving

ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)
    with serving(FakeService()) as url:
        place = urlsplit(url)
        assert place.hostname
        assert place.port
        yield place.hostname, place.port


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nX-Slow: "])
def test_who_does_not_come_to_the_point_is_hung_up_on(address: tuple[str, int], said: bytes) -> None:
    with socket.create_connection(address, 10) as client:
        client.sendall(said)
        assert client.recv(100) == b""


def test_a_second_request_that_never_ends_is_hung_up_on(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 10) as client:
        client.sendall(ASK)
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        client.sendall(ASK[:20])
        while client.recv(10_000):
            pass


def test_a_body_that_nobody_wants_is_not_waited_for(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 10) as client:
        client.sendall(ASK[:-2] + b"Content-Length: 1000000\r\n\r\nx")
        assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        stopping = threading.Event()
        drips = threading.Thread(target=_drip, args=(client, stopping))
        drips.start()
        try:
            with suppress(ConnectionResetError):  # hung up on, with a drip on the way
                while client.recv(10_000):
                    pass
        finally:
            stopping.set()
            drips.join()


def _drip(client: socket.socket, stopping: threading.Event) -> None:
    with suppress(OSError):
        while not stopping.wait(0.01):
            client.sendall(b"x")
