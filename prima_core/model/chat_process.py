"""The owner's side of the process that renders chat templates: start it, ask it with a deadline, end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from prima_core.model.chat_worker import LENGTH, MAX_REPLY_BYTES, Reply

_START_S = 30.0  # a fifth of a second when nothing else runs
_END_S = 5.0
_ROOT = Path(__file__).parents[2]


class DeadChildError(Exception):
    """The child ended, or said what makes no sense, instead of answering."""


class OutOfTimeError(Exception):
    """The child did not answer in time and was killed."""


class ChatProcess:
    """A running child. One thread at a time. After any exception it is of no use: close it."""

    def __init__(self, setup: Mapping[str, object]) -> None:
        self._process = _spawn()
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._start(setup)
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: bytes, limit_s: float) -> tuple[bytes, str]:
        """Send a request; give the answer's letter and text. The child is killed after `limit_s`."""
        out_of_time = threading.Event()

        def kill() -> None:
            out_of_time.set()
            self._process.kill()  # the pipes end with it, which wakes the reader below

        timer = threading.Timer(limit_s, kill)
        timer.start()
        try:
            return self._exchange(request)
        except (OSError, UnicodeDecodeError, DeadChildError) as error:
            if out_of_time.is_set():
                raise OutOfTimeError from None
            raise DeadChildError(str(error) or type(error).__name__) from None
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """End the child and wait until it has ended. May be called again."""
        self._end()

    def _start(self, setup: Mapping[str, object]) -> None:
        try:
            letter, _ = self.ask(json.dumps(setup).encode(), _START_S)
        except OutOfTimeError:
            raise DeadChildError(f"it did not start within {_START_S:g} s") from None
        if letter != Reply.READY:
            raise DeadChildError(f"it began with {letter!r}")

    def _exchange(self, request: bytes) -> tuple[bytes, str]:
        pipe = _pipe(self._process.stdin)
        pipe.write(LENGTH.pack(len(request)) + request)
        pipe.flush()
        n_bytes: int = LENGTH.unpack(self._read(LENGTH.size))[0]
        if not 1 <= n_bytes <= MAX_REPLY_BYTES:
            raise DeadChildError(f"an answer of {n_bytes} bytes")
        answer = self._read(n_bytes)
        return answer[:1], answer[1:].decode("utf-8", "surrogatepass")

    def _read(self, n_bytes: int) -> bytes:
        data = _pipe(self._process.stdout).read(n_bytes)
        if len(data) == n_bytes:
            return data
        code = self._process.wait(_END_S)
        raise DeadChildError(f"exit code {code}")


def _spawn() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "prima_core.model.chat_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
    except OSError as error:
        raise DeadChildError(f"it could not be started: {error}") from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise DeadChildError("it has no pipe")
    return pipe


def _environment() -> dict[str, str]:
    """Ours without our secrets, and so that the child finds this very package, however it was found here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PRIMA_")}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), kept.get("PYTHONPATH"))))}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            _pipe(pipe).close()
        except OSError:  # what was not flushed has nowhere to go
            continue
    process.wait(_END_S)
