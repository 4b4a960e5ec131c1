"""A server in a node's cage, asked over an API like OpenAI's from outside of it."""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from prima_core.errors import ClusterError

MAX_ANSWER_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20
ASK_WITHIN_S = 5.0
TOKEN_WITHIN_S = 600.0
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_OWN = "/proc/thread-self/ns/net"


@contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """This thread is in another network namespace until the block ends; sockets that it opens stay there."""
    own = os.open(_OWN, os.O_RDONLY)
    try:
        _enter(namespace)
        yield
    finally:
        _enter_open(own)
        os.close(own)


def _enter(namespace: Path) -> None:
    other = os.open(namespace, os.O_RDONLY)
    try:
        _enter_open(other)
    finally:
        os.close(other)


def _enter_open(file: int) -> None:
    """`setns`, which Python has from 3.12 on."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Api:
    """`url` as clients are told, with /v1."""

    def __init__(self, namespace: Path, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self._namespace = namespace
        self._place = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._path = parts.path.rstrip("/")

    def is_ready(self) -> bool:
        """Whether it lists its models, and, where it tells its health, is well."""
        return self._status(f"{self._path}/models") == 200 and self._status("/health") in (200, 404)

    def _status(self, path: str) -> int | None:
        try:
            return self.get(path)[0]
        except OSError:
            return None

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError."""
        with closing(self._connect(ASK_WITHIN_S)) as connection:
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read(MAX_ANSWER_BYTES)
            except http.client.HTTPException as error:
                raise OSError(f"no HTTP answer: {error}") from error

    def tokens(self, prompt: Sequence[int], n: int) -> Iterator[float]:
        """The time at which each token came, of `time.monotonic`. Raises ClusterError when it fails."""
        body = {
            "prompt": list(prompt),
            "max_tokens": n,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,  # so that a token without text of its own is told as well
            "stream": True,
        }
        with closing(self._connect(TOKEN_WITHIN_S)) as connection:
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", f"{self._path}/completions", msgspec.json.encode(body), headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise _refused(self.url, answer.read(MAX_ANSWER_BYTES))
                yield from _times(answer, self.url)
            except (OSError, http.client.HTTPException) as error:
                raise ClusterError(f"the answer of {self.url} ended: {error}") from error

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*self._place, timeout=timeout_s)
        with inside(self._namespace):
            connection.sock = socket.create_connection(self._place, timeout_s)
        return connection


def _times(answer: http.client.HTTPResponse, url: str) -> Iterator[float]:
    while line := answer.readline(MAX_LINE_BYTES):
        now = time.monotonic()
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = _decoded(line[6:], url)
        if "error" in event:
            raise _refused(url, line[6:])
        if any(choice.get("text") or choice.get("logprobs") for choice in event.get("choices", ())):
            yield now


def _decoded(data: bytes, url: str) -> Mapping[str, Any]:  # Any: JSON
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ClusterError(f"{url} answers with something that is no event: {error}") from error


def _refused(url: str, body: bytes) -> ClusterError:
    return ClusterError(f"{url} does not answer: {body[:1000].decode(errors='replace').strip()}")
