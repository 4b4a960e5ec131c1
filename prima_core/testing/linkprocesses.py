"""What a transport has to do between processes, of which some are killed."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from prima_core.errors import LinkTimeout
from prima_core.interfaces import Limits, SendLink
from prima_core.testing.links import LIMITS, LONG_S, SHORT_S, Bench, Case, error_of, expect_nothing, take
from prima_core.testing.report import NotOffered, Wrong, expect

_START_S = 30.0  # of a process, which imports the transport
_Main = Callable[[Bench, Connection, str], None]


class Child:
    """A process that has a transport of its own. What it tells comes by a pipe; `end` kills it if need be."""

    def __init__(self, case: Case, main: _Main, address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, pipe = context.Pipe()
        self._process: BaseProcess = context.Process(target=_run, args=(case, main, pipe, address), daemon=True)
        self._process.start()
        pipe.close()  # here: so that its end is noticed

    def hear(self) -> str:
        try:
            if self._pipe.poll(_START_S):
                return str(self._pipe.recv())
        except EOFError:
            raise Wrong("a process that works", f"one that ended with code {self.ended()}, see its output") from None
        raise Wrong("a process that works", f"one that said nothing within {_START_S:g} s")

    def ended(self) -> int | None:
        """Its exit code, if it ends soon."""
        self._process.join(LONG_S)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> None:
        self.kill()
        self._process.close()
        self._pipe.close()


def _run(case: Case, main: _Main, pipe: Connection, address: str) -> None:
    main(Bench(case), pipe, address)


def _child(bench: Bench, main: _Main, address: str) -> Child:
    if not bench.case.crosses_processes:
        raise NotOffered("its links end with the process")
    child = Child(bench.case, main, address)
    bench.exits.callback(child.end)
    return child


# ---------------------------------------------------------------- what the other process does


def _send_five(bench: Bench, pipe: Connection, address: str) -> None:
    sender = bench.dial(address)
    for number in range(5):
        sender.send([bytes([number])], LONG_S)
    pipe.send("sent")
    pipe.recv()


def _send_for_ever(bench: Bench, pipe: Connection, address: str) -> None:
    sender, number, told = bench.dial(address, Limits(max_queued=2)), 0, False
    while True:
        try:
            sender.send([number.to_bytes(4, "little") * 250_000], SHORT_S)
            number += 1
        except LinkTimeout:
            if not told and number:
                pipe.send("clogged")
                told = True


def _listen_and_tell(bench: Bench, pipe: Connection, address: str) -> None:
    receiver = bench.listen(address)
    pipe.send(receiver.address)
    while True:
        with suppress(LinkTimeout):
            pipe.send(str(receiver.receive(LONG_S), "ascii"))


def _forget_to_close(bench: Bench, pipe: Connection, address: str) -> None:
    """Ends with a thread in `receive`, as programs do that fail."""
    receiver = bench.transport.listen(bench.case.address, bench.case.credentials, LIMITS)
    threading.excepthook = lambda _: None  # the link's end ends it
    threading.Thread(target=receiver.receive, args=(_START_S,), daemon=True).start()
    bench.transport.dial(address, bench.case.credentials, LIMITS).send([b"bye"], LONG_S)


# ---------------------------------------------------------------- checks


def another_process_can_dial_the_address(bench: Bench) -> None:
    receiver = bench.listen()
    _child(bench, _send_five, receiver.address).hear()
    came = [take(receiver) for _ in range(5)]
    expect(came == [bytes([number]) for number in range(5)], "its messages", came)


def a_killed_sender_hides_no_other(bench: Bench) -> None:
    receiver = bench.listen()
    child = _child(bench, _send_five, receiver.address)
    child.hear()
    first = take(receiver)
    expect(first == b"\0", "its first message", first)
    child.kill()  # with messages of its own unread
    bench.dial(receiver.address).send([b"successor"], LONG_S)
    messages = [take(receiver)]
    while b"successor" not in messages:
        messages.append(take(receiver))
    late = [message for message in messages if message != b"successor"]
    expect(late == [bytes([number + 1]) for number in range(len(late))], "what else it had sent, in order", late)


def a_sender_that_is_killed_inside_a_message_leaves_no_torn_one(bench: Bench) -> None:
    receiver = bench.listen(limits=Limits(max_queued=2))
    child = _child(bench, _send_for_ever, receiver.address)
    child.hear()
    child.kill()
    bench.dial(receiver.address).send([b"successor"], LONG_S)
    number = 0
    while (message := take(receiver)) != b"successor":
        whole = message == number.to_bytes(4, "little") * 250_000
        expect(whole, f"message {number}, whole", f"{len(message)} bytes, {message[:8]!r}...")
        number += 1


def a_killed_receiver_is_noticed_and_its_successor_found(bench: Bench) -> None:
    address = bench.gone() if bench.case.crosses_processes else ""
    first = _child(bench, _listen_and_tell, address)
    sender = bench.dial(first.hear())
    sender.send([b"one"], _START_S)
    told = first.hear()
    expect(told == "one", "the message at the other process", told)
    first.kill()
    error_of(LinkTimeout, "sending on to a receiver that was killed", lambda: _send_on(sender))
    second = _child(bench, _listen_and_tell, address)
    second.hear()
    sender.send([b"two"], LONG_S)
    while (told := second.hear()) != "two":  # what was sent meanwhile may have waited for it
        expect(told == "more", "a whole message", told)


def _send_on(sender: SendLink) -> None:
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        sender.send([b"more"], SHORT_S)


def a_process_that_forgets_to_close_ends(bench: Bench) -> None:
    receiver = bench.listen()
    child = _child(bench, _forget_to_close, receiver.address)
    came = bytes(receiver.receive(_START_S))
    expect(came == b"bye", "its message", came)
    code = child.ended()
    expect(code == 0, "an end with code 0", f"code {code}", "close what is open at exit, or use daemon threads")
    expect_nothing(receiver, "of a process that has ended")


CHECKS = (
    another_process_can_dial_the_address,
    a_killed_sender_hides_no_other,
    a_sender_that_is_killed_inside_a_message_leaves_no_torn_one,
    a_killed_receiver_is_noticed_and_its_successor_found,
    a_process_that_forgets_to_close_ends,
)
