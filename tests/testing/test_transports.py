"""The kit for transports: each of some broken ones is caught by the check that names its fault.

That ours pass is in tests/transports/test_links.py.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import pytest

from prima_core.errors import LinkBroken, LinkTimeout, PluginError
from prima_core.interfaces import Buffer, Credentials, Limits, Transport, TransportPlugin
from prima_core.testing import links
from prima_core.testing.links import Case
from prima_core.testing.report import Check, CheckFailed, Recorder, State
from prima_core.testing.transports import CHECKS, OURS, STRANGERS, check_transport, run_check
from prima_inproc.transport import InprocReceiveLink, InprocSendLink, InprocTransport


def test_an_installed_transport_is_named_by_its_scheme() -> None:
    report = check_transport("inproc", wrong_credentials=None, crosses_processes=False)
    assert report.subject == "transport inproc"
    with pytest.raises(PluginError, match="there is no transport 'inprok'"):
        check_transport("inprok")


# ---------------------------------------------------------------- faults: inproc, but


class Faulty(InprocTransport):
    """With links of other classes."""

    def __init__(self, receiver: type[InprocReceiveLink], sender: type[InprocSendLink]) -> None:
        super().__init__()
        self._receiver, self._sender = receiver, sender

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> InprocReceiveLink:
        link = super().listen(address, credentials, limits)
        link.__class__ = self._receiver
        return link

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> InprocSendLink:
        link = super().dial(address, credentials, limits)
        link.__class__ = self._sender
        return link


class TakesTheNewestFirst(InprocReceiveLink):
    def put(self, message: bytes) -> None:
        super().put(message)
        self._waiting.rotate(1 if len(message) < 1000 else 0)


class NeverFull(InprocReceiveLink):
    def has_room(self) -> bool:
        return True


class TakesMessagesOfAnyLength(InprocReceiveLink):
    def put(self, message: bytes) -> None:
        self._waiting.append(message)
        self._changed.notify_all()


class TimesOutByAForeignError(InprocReceiveLink):
    def receive(self, timeout_s: float) -> memoryview:
        try:
            return super().receive(timeout_s)
        except LinkTimeout:
            raise TimeoutError("timed out") from None


class WaitsForEver(InprocReceiveLink):
    def receive(self, timeout_s: float) -> memoryview:
        with suppress(LinkTimeout):
            return super().receive(timeout_s)
        return super().receive(1000.0)


class SleepsThroughClose(InprocReceiveLink):
    def close(self) -> None:
        waiting, self._changed = self._changed, threading.Condition()
        super().close()
        self._changed = waiting


class ReceivesIntoTheSameMemory(InprocReceiveLink):
    def receive(self, timeout_s: float) -> memoryview:
        message = super().receive(timeout_s)
        memory = self.__dict__.setdefault("memory", bytearray(5_000_000))
        memory[: message.nbytes] = message
        return memoryview(memory)[: message.nbytes]


class ClosesOnce(InprocReceiveLink):
    def close(self) -> None:
        if self._closed:
            raise ValueError("closed")
        super().close()


class TellsHalfItsAddress(InprocReceiveLink):
    @property
    def address(self) -> str:
        return "inproc://"


class DropsWhatFindsNoRoom(InprocSendLink):
    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        message = b"".join(parts)
        receiver = self._listeners.get(self._peer.removeprefix("inproc://"))
        if receiver is None or receiver.has_room():
            super().send([message], timeout_s)


class SendsEachPart(InprocSendLink):
    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        for part in parts:
            super().send([part], timeout_s)


class TimesOutAndSendsLater(InprocSendLink):
    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        late = self.__dict__.setdefault("late", [])
        message = b"".join(parts)
        try:
            while late:
                super().send(late[:1], timeout_s)
                del late[0]
            super().send([message], timeout_s)
        except LinkTimeout:
            late.append(message)
            raise


class StaysWithTheFirst(InprocSendLink):
    def _ready_peer(self) -> InprocReceiveLink | None:
        first: InprocReceiveLink | None = self.__dict__.setdefault("first", super()._ready_peer())
        return first if first is not None and first.has_room() else None


class WaitsForThePeerInDial(Faulty):
    def dial(self, address: str, credentials: Credentials, limits: Limits) -> InprocSendLink:
        if address.removeprefix("inproc://") not in self._listeners:
            raise LinkBroken("nobody is there")
        return super().dial(address, credentials, limits)


class LeavesAThread(Faulty):
    def listen(self, address: str, credentials: Credentials, limits: Limits) -> InprocReceiveLink:
        threading.Thread(target=threading.Event().wait, args=(30.0,), daemon=True).start()
        return super().listen(address, credentials, limits)


class TakesATakenAddress(Faulty):
    def listen(self, address: str, credentials: Credentials, limits: Limits) -> InprocReceiveLink:
        self._listeners.pop(address.removeprefix("inproc://"), None)
        return super().listen(address, credentials, limits)


def open_in_this_process_only() -> Transport:
    if multiprocessing.parent_process() is not None:
        raise SystemExit(3)
    return InprocTransport()


def receiver(kind: type[InprocReceiveLink]) -> Callable[[], Transport]:
    return partial(Faulty, kind, InprocSendLink)


def sender(kind: type[InprocSendLink]) -> Callable[[], Transport]:
    return partial(Faulty, InprocReceiveLink, kind)


def whole(kind: type[Faulty]) -> Callable[[], Transport]:
    return partial(kind, InprocReceiveLink, InprocSendLink)


CAUGHT = [
    (receiver(TakesTheNewestFirst), "each peers messages keep their order", "in order"),
    (receiver(NeverFull), "a full queue makes send wait and loses nothing", "200 messages of 500000 bytes were taken"),
    (receiver(TakesMessagesOfAnyLength), "a receiver trusts its own limit only", "one of 100000 bytes"),
    (receiver(TimesOutByAForeignError), "receive times out in time", "TimeoutError: timed out"),
    (receiver(WaitsForEver), "receive times out in time", "it hangs"),
    (receiver(SleepsThroughClose), "close ends a waiting receive", "it hangs"),
    (receiver(ReceivesIntoTheSameMemory), "a message belongs to who received it", "changed bytes"),
    (receiver(ClosesOnce), "closed links say so", "ValueError: closed"),
    (receiver(TellsHalfItsAddress), "the bound address is complete", "two links at two addresses"),
    (sender(DropsWhatFindsNoRoom), "a full queue makes send wait and loses nothing", "messages"),
    (sender(SendsEachPart), "parts arrive as one message", "4 bytes"),
    (sender(TimesOutAndSendsLater), "a send that times out has sent nothing", "b'lost'"),
    (sender(StaysWithTheFirst), "a successor at the same address takes over", "none within"),
    (whole(WaitsForThePeerInDial), "dial returns at once and the peer may come later", "LinkBroken: nobody is there"),
    (whole(LeavesAThread), "closing leaves no thread", "Thread-"),
    (whole(TakesATakenAddress), "a taken address is refused", "no error"),
    (InprocTransport, "a stranger gets nothing in", "no error"),
    (InprocTransport, "nothing is sent to a stranger", "no error"),
    (open_in_this_process_only, "another process can dial the address", "ended with code 3"),
]


def outcome(open_: Callable[[], Transport], name: str, limit_s: float) -> Check:
    case = Case(open_, "inproc://", OURS, STRANGERS, crosses_processes=True)
    recorder = Recorder()
    [check] = [check for check in CHECKS if check.__name__.replace("_", " ") == name]
    run_check(recorder, check, case, limit_s)
    return recorder.checks[0]


@pytest.mark.parametrize(("open_", "name", "says"), CAUGHT, ids=[f"{name}: {says}" for _, name, says in CAUGHT])
def test_a_fault_is_caught_by_the_check_that_names_it(
    monkeypatch: pytest.MonkeyPatch, open_: Callable[[], Transport], name: str, says: str
) -> None:
    monkeypatch.setattr(links, "LONG_S", 0.5)  # how long is tried where nothing comes
    found = outcome(open_, name, limit_s=1.0 if says == "it hangs" else 20.0)
    assert found.state is State.FAILED
    assert says in str(found)


def test_all_faults_are_told_in_one_error() -> None:
    offer = TransportPlugin("inproc", 1, receiver(TakesMessagesOfAnyLength))
    with pytest.raises(CheckFailed, match="transport inproc: 1 of 32 checks failed") as caught:
        check_transport(offer, wrong_credentials=None, crosses_processes=False)
    assert [check.name for check in caught.value.failures] == ["a receiver trusts its own limit only"]
