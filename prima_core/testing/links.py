"""What checks of transports work with: the transport, links that are closed at the end, and threads that end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

from prima_core.errors import LinkError, LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, SendLink, Transport, TransportPlugin
from prima_core.plugins import Registry
from prima_core.testing.report import Wrong, expect

LONG_S = 10.0  # of what comes at once unless something is broken
SHORT_S = 0.1
SLACK_S = 2.0  # a wait may take so much longer on a machine that has other work
LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Case:
    """The transport that is checked; it goes to other processes, so `open` is a function of a module."""

    open: Callable[[], Transport]
    address: str
    credentials: Credentials
    wrong: Credentials | None
    crosses_processes: bool


def opener(transport: TransportPlugin | str) -> Callable[[], Transport]:
    """What opens the transport, in any process."""
    return partial(_open_installed, transport) if isinstance(transport, str) else transport.open


def _open_installed(scheme: str) -> Transport:
    return Registry.load(os.environ).transport(f"{scheme}://")


class Bench:
    """The transport and what was opened on it, for one check; closed at the end of the block."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.transport = case.open()
        self.exits = ExitStack()

    def listen(
        self, address: str | None = None, limits: Limits = LIMITS, credentials: Credentials | None = None
    ) -> ReceiveLink:
        """At a free place where no address is given."""
        place = self.case.address if address is None else address
        link = self.transport.listen(place, credentials or self.case.credentials, limits)
        self.exits.callback(link.close)
        return link

    def dial(self, address: str, limits: Limits = LIMITS, credentials: Credentials | None = None) -> SendLink:
        link = self.transport.dial(address, credentials or self.case.credentials, limits)
        self.exits.callback(link.close)
        return link

    def gone(self) -> str:
        """An address at which nobody listens now, and somebody may."""
        link = self.listen()
        link.close()
        return link.address

    def close(self) -> None:
        self.exits.close()
        close = getattr(self.transport, "close", None)  # it need not have one
        if close is not None:
            close()


def take(link: ReceiveLink) -> bytes:
    return bytes(link.receive(LONG_S))


def take_in_tries(receive: Callable[[], memoryview]) -> bytes:
    """The message, after as many timeouts as it takes."""
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        with suppress(LinkTimeout):
            return bytes(receive())
    raise Wrong("a message", f"none within {LONG_S:g} s")


def expect_nothing(link: ReceiveLink, why: str) -> None:
    try:
        message = link.receive(SHORT_S)
    except LinkTimeout:
        return
    raise Wrong(f"no message {why}", f"one of {message.nbytes} bytes")


def error_of(kind: type[LinkError], doing: str, call: Callable[[], object]) -> LinkError:
    """The error that `call` ends with, which must be of this kind."""
    expected = f"{kind.__name__} from {doing}"
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        hint = "translate the exceptions of the library; the docstrings of prima_core.errors say what each kind means"
        raise Wrong(expected, f"{type(error).__name__}: {error}", hint) from error
    raise Wrong(expected, "no error")


def timed(call: Callable[[], object]) -> float:
    """How long it took, in seconds."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


def in_thread(work: Callable[[], object]) -> Callable[[], Exception | None]:
    """Start `work`; the returned function joins it and gives the exception that it ended with."""
    ended: list[Exception] = []
    started = threading.Event()

    def main() -> None:
        started.set()
        try:
            work()
        except Exception as error:  # noqa: BLE001  # it is looked at by who joins
            ended.append(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    started.wait()

    def join() -> Exception | None:
        thread.join(LONG_S + SLACK_S)
        expect(not thread.is_alive(), "every call to end", "one that does not", "no wait may outlast its timeout")
        return ended[0] if ended else None

    return join


def expect_end(join: Callable[[], Exception | None], kind: type[LinkError], doing: str) -> None:
    error = join()
    expect(isinstance(error, kind), f"{kind.__name__} from {doing}", f"{type(error).__name__}: {error}")
