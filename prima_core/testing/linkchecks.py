"""What a transport has to do between threads of one process. Each check's name is a claim."""

from __future__ import annotations

import array
import random
import threading
import time
from contextlib import suppress

from prima_core.errors import LinkBroken, LinkClosed, LinkError, LinkTimeout
from prima_core.interfaces import Limits, ReceiveLink, SendLink
from prima_core.testing.links import (
    LONG_S,
    SHORT_S,
    SLACK_S,
    Bench,
    error_of,
    expect_end,
    expect_nothing,
    in_thread,
    take,
    take_in_tries,
    timed,
)
from prima_core.testing.report import Figures, NotOffered, Wrong, expect

_TRIES = 10  # of a race
_MANY_PARTS = 3000  # more than a system call takes


# ---------------------------------------------------------------- messages


def parts_arrive_as_one_message(bench: Bench) -> None:
    receiver = bench.listen()
    sender = bench.dial(receiver.address)
    floats = array.array("f", range(1000))
    sender.send([b"head", bytearray(b"er"), memoryview(floats), b"", memoryview(b"end")[1:]], LONG_S)
    came, expected = take(receiver), b"header" + floats.tobytes() + b"nd"
    expect(came == expected, f"{len(expected)} bytes, as they were sent", f"{len(came)} bytes: {came[:20]!r}...")
    sender.send((bytes([index % 251]) for index in range(_MANY_PARTS)), LONG_S)
    expect(take(receiver) == bytes(index % 251 for index in range(_MANY_PARTS)), "3000 parts as one message", "others")


def every_size_to_the_limit_arrives(bench: Bench) -> None:
    limits = Limits(max_message_bytes=5_000_000)
    receiver = bench.listen(limits=limits)
    sender = bench.dial(receiver.address, limits)
    for size in (0, 1, 7, 8, 9, 4096, 65_535, 65_536, 1_000_003, limits.max_message_bytes):
        data = random.Random(size).randbytes(size)
        join = in_thread(lambda data=data: sender.send([data[:1], data[1:]], LONG_S))  # type: ignore[misc]  # mypy cannot
        came = take(receiver)
        expect(came == data, f"the {size} bytes that were sent", f"{len(came)} bytes, or others")
        expect(join() is None, f"no error from sending {size} bytes", join())


def no_message_is_longer_than_the_limit(bench: Bench) -> None:
    limits = Limits(max_message_bytes=1000)
    receiver = bench.listen(limits=limits)
    sender = bench.dial(receiver.address, limits)
    error_of(LinkBroken, "sending 1001 bytes where 1000 are the limit", lambda: sender.send([bytes(1001)], LONG_S))
    sender.send([bytes(1000)], LONG_S)
    size = receiver.receive(LONG_S).nbytes
    expect(size == 1000, "the next message on the same link, of 1000 bytes", f"one of {size} bytes")


def a_receiver_trusts_its_own_limit_only(bench: Bench) -> None:
    receiver = bench.listen(limits=Limits(max_message_bytes=1000))
    with suppress(LinkBroken):  # some know it at once
        bench.dial(receiver.address).send([bytes(100_000)], LONG_S)
    expect_nothing(receiver, "of 100000 bytes where the receiver's limit is 1000")
    bench.dial(receiver.address).send([b"hello"], LONG_S)
    expect(take(receiver) == b"hello", "the message of another peer", "another message")


def a_message_belongs_to_who_received_it(bench: Bench) -> None:
    receiver = bench.listen()
    sender = bench.dial(receiver.address)
    for letter in (b"x", b"y"):
        sender.send([letter * 100_000], LONG_S)
    first, second = receiver.receive(LONG_S), receiver.receive(LONG_S)
    receiver.close()
    intact = bytes(first) == b"x" * 100_000 and bytes(second) == b"y" * 100_000
    expect(intact, "messages that stay as they came, after others and after close", "changed bytes")
    expect(first.readonly, "a memoryview that is read-only", "one that can be written to")


# ---------------------------------------------------------------- order, and queues that are full


def each_peers_messages_keep_their_order(bench: Bench) -> None:
    n_peers, n_each = 4, 150
    receiver = bench.listen()
    senders = [bench.dial(receiver.address) for _ in range(n_peers)]

    def send(index: int) -> None:
        for number in range(n_each):
            body = bytes(number * 997 % 9000)  # of all sizes: small ones may not overtake
            senders[index].send([bytes([index]), number.to_bytes(2, "little"), body], LONG_S)

    joins = [in_thread(lambda index=index: send(index)) for index in range(n_peers)]  # type: ignore[misc]  # mypy cannot
    messages = [bytes(receiver.receive(LONG_S)[:3]) for _ in range(n_peers * n_each)]
    for index, join in enumerate(joins):
        expect(join() is None, f"no error at sender {index}", join())
        numbers = [int.from_bytes(message[1:], "little") for message in messages if message[0] == index]
        expect(numbers == list(range(n_each)), f"the messages of sender {index} in order", numbers)


def many_threads_may_send_on_one_link(bench: Bench) -> None:
    receiver = bench.listen()
    sender = bench.dial(receiver.address)

    def send(index: int) -> None:
        for _ in range(50):
            sender.send([bytes([index]) * 10_000], LONG_S)

    joins = [in_thread(lambda index=index: send(index)) for index in range(3)]  # type: ignore[misc]  # mypy cannot
    whole = sorted(bytes([index]) * 10_000 for _ in range(50) for index in range(3))
    expect(sorted(take(receiver) for _ in whole) == whole, "150 whole messages", "torn or lost ones")
    for join in joins:
        expect(join() is None, "no error", join())


def a_full_queue_makes_send_wait_and_loses_nothing(bench: Bench) -> Figures:
    limits = Limits(max_queued=2)
    receiver = bench.listen(limits=limits)
    sender = bench.dial(receiver.address, limits)
    block, most = bytes(500_000), 200
    sent = 0
    with suppress(LinkTimeout):
        while sent < most:
            sender.send([sent.to_bytes(4, "little"), block], LONG_S if sent == 0 else SHORT_S)
            sent += 1
    hint = "max_queued and the buffers below bound what waits; then send waits, and says LinkTimeout"
    expect(sent < most, "LinkTimeout when the queues are full", f"{most} messages of 500000 bytes were taken", hint)
    numbers = []
    with suppress(LinkTimeout):
        numbers = [int.from_bytes(receiver.receive(LONG_S)[:4], "little") for _ in range(sent)]
    hint = "what was taken must arrive, what was not must not"
    expect(numbers == list(range(sent)), f"the {sent} messages that were taken, in order", numbers, hint)
    expect_nothing(receiver, "after a send that timed out")
    sender.send([b"more"], LONG_S)
    expect(take(receiver) == b"more", "the link to go on", "another message")
    return {"messages taken": sent}


def the_queues_take_what_they_promise(bench: Bench) -> None:
    """The ring's credit is `max_queued`: so many messages must be taken though nobody is in `receive`."""
    limits = Limits(max_queued=8)
    receiver = bench.listen(limits=limits)
    sender = bench.dial(receiver.address, limits)
    for number in range(limits.max_queued):
        try:
            sender.send([bytes(1_000_000)], LONG_S)
        except LinkTimeout as error:
            raise Wrong("8 messages taken where max_queued is 8 and nobody receives", f"{number}: {error}") from None
    expect(all(receiver.receive(LONG_S).nbytes == 1_000_000 for _ in range(8)), "all of them", "others")


# ---------------------------------------------------------------- timeouts


def receive_times_out_in_time(bench: Bench) -> None:
    receiver = bench.listen()
    for timeout_s in (0.0, 0.05, 0.12):
        doing = f"a receive within {timeout_s:g} s with no message"
        took_s = timed(lambda t=timeout_s, d=doing: error_of(LinkTimeout, d, lambda: receiver.receive(t)))  # type: ignore[misc]  # mypy cannot
        expect(timeout_s - 0.01 <= took_s < timeout_s + SLACK_S, f"an end after {timeout_s:g} s", f"after {took_s:g} s")


def receive_with_no_time_takes_what_is_there(bench: Bench) -> None:
    receiver = bench.listen()
    sender = bench.dial(receiver.address)
    for message in (b"one", b"two"):
        sender.send([message], LONG_S)
    expect(take(receiver) == b"one", "the first message", "another")
    expect(take_in_tries(lambda: receiver.receive(0.0)) == b"two", "the second message", "another")


def a_send_that_times_out_has_sent_nothing(bench: Bench) -> None:
    address = bench.gone()
    sender = bench.dial(address)
    for timeout_s in (0.0, 0.12):
        doing = f"a send within {timeout_s:g} s with no peer"
        took_s = timed(lambda t=timeout_s, d=doing: error_of(LinkTimeout, d, lambda: sender.send([b"lost"], t)))  # type: ignore[misc]  # mypy cannot
        expect(timeout_s - 0.01 <= took_s < timeout_s + SLACK_S, f"an end after {timeout_s:g} s", f"after {took_s:g} s")
    receiver = bench.listen(address)
    sender.send([b"kept"], LONG_S)
    came = take(receiver)
    expect(came == b"kept", "the message that was sent, not the one that timed out", came)


# ---------------------------------------------------------------- who comes late, and who comes after


def dial_returns_at_once_and_the_peer_may_come_later(bench: Bench) -> None:
    address = bench.gone()
    start = time.monotonic()
    sender = bench.dial(address)
    expect(time.monotonic() - start < 1.0, "dial to return at once", f"it took {time.monotonic() - start:g} s")
    expect(sender.peer == address, f"{address} as the link's peer", sender.peer)
    join = in_thread(lambda: sender.send([b"early"], LONG_S))
    receiver = bench.listen(address)
    expect(take(receiver) == b"early", "the message that waited for the peer", "another")
    expect(join() is None, "no error", join())


def a_successor_at_the_same_address_takes_over(bench: Bench) -> None:
    first = bench.listen()
    sender = bench.dial(first.address)
    sender.send([b"first"], LONG_S)
    expect(take(first) == b"first", "the first message", "another")
    first.close()
    second = bench.listen(first.address)

    def send_and_receive() -> memoryview:
        sender.send([b"again"], SHORT_S)  # one that hits the dead peer may be lost
        return second.receive(SHORT_S)

    expect(take_in_tries(send_and_receive) == b"again", "a message at the successor", "another")


# ---------------------------------------------------------------- close


def closed_links_say_so(bench: Bench) -> None:
    receiver = bench.listen()
    sender = bench.dial(receiver.address)
    for link in (receiver, sender, receiver, sender):
        link.close()
    error_of(LinkClosed, "receive after close", lambda: receiver.receive(LONG_S))
    error_of(LinkClosed, "send after close", lambda: sender.send([b"x"], LONG_S))


def what_was_sent_before_close_arrives(bench: Bench) -> None:
    receiver = bench.listen()
    for number in range(_TRIES):
        sender = bench.dial(receiver.address)
        sender.send([b"last words"], LONG_S)
        sender.send([bytes([number])], LONG_S)
        sender.close()
        came = [take_in_tries(lambda: receiver.receive(SHORT_S)) for _ in range(2)]
        expect(came == [b"last words", bytes([number])], "both messages", came)


def close_ends_a_waiting_receive(bench: Bench) -> None:
    for _ in range(_TRIES):
        receiver = bench.listen()
        join = in_thread(lambda receiver=receiver: receiver.receive(LONG_S))  # type: ignore[misc]  # mypy cannot
        took_s = timed(receiver.close)
        expect_end(join, LinkClosed, "a receive that is closed meanwhile")
        expect(took_s < SLACK_S, "close to return soon", f"after {took_s:g} s")


def close_ends_a_waiting_send(bench: Bench) -> None:
    for _ in range(_TRIES):
        sender = bench.dial(bench.gone())
        join = in_thread(lambda sender=sender: sender.send([b"x"], LONG_S))  # type: ignore[misc]  # mypy cannot
        took_s = timed(sender.close)
        expect_end(join, LinkClosed, "a send that is closed meanwhile")
        expect(took_s < SLACK_S, "close to return soon", f"after {took_s:g} s")


def close_ends_a_send_to_a_peer_that_does_not_read(bench: Bench) -> None:
    limits = Limits(max_queued=1)
    receiver = bench.listen(limits=limits)
    sender = bench.dial(receiver.address, limits)

    def send_on() -> None:
        while True:
            sender.send([bytes(1_000_000)], LONG_S)

    join = in_thread(send_on)
    with suppress(LinkTimeout):  # until the queues are full
        while True:
            sender.send([bytes(1_000_000)], SHORT_S)
    sender.close()
    expect_end(join, LinkClosed, "a send that is closed meanwhile")


def close_in_the_middle_of_traffic_ends_both_sides(bench: Bench) -> None:
    for _ in range(5):
        receiver = bench.listen()
        sender = bench.dial(receiver.address)

        def send_on(sender: SendLink = sender) -> None:
            while True:
                sender.send([bytes(10_000)], LONG_S)

        def receive_on(receiver: ReceiveLink = receiver) -> None:
            while True:
                receiver.receive(LONG_S)

        joins = [in_thread(send_on), in_thread(receive_on)]
        closing = [in_thread(link.close) for link in (receiver, sender, receiver, sender)]  # from several threads
        for join in joins:
            expect_end(join, LinkClosed, "traffic that is closed")
        for join in closing:
            expect(join() is None, "no error from close", join())


def closing_leaves_no_thread(bench: Bench) -> None:
    def use() -> None:
        receiver = bench.listen()
        sender = bench.dial(receiver.address)
        sender.send([bytes(3_000_000)], LONG_S)
        receiver.receive(LONG_S)
        sender.close()
        receiver.close()

    use()  # the first may start what stays
    before = set(threading.enumerate())
    for _ in range(5):
        use()
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    expect(not left, "no thread after close", ", ".join(left))


# ---------------------------------------------------------------- addresses


def the_bound_address_is_complete(bench: Bench) -> None:
    first, second = bench.listen(), bench.listen()
    expect(first.address != second.address, "two links at two addresses", first.address)
    scheme = bench.case.address.partition("://")[0]
    expect(first.address.startswith(f"{scheme}://"), f"an address of {scheme}", first.address)
    sender = bench.dial(second.address)
    sender.send([b"for the second"], LONG_S)
    expect(take(second) == b"for the second", "a message at the link that was dialled", "another")
    expect_nothing(first, "at the other link")


def a_taken_address_is_refused(bench: Bench) -> None:
    receiver = bench.listen()
    error_of(LinkBroken, f"listening at {receiver.address} twice", lambda: bench.listen(receiver.address))
    bench.dial(receiver.address).send([b"still here"], LONG_S)
    expect(take(receiver) == b"still here", "the first listener undisturbed", "another message")


def an_address_is_free_after_close(bench: Bench) -> None:
    address = bench.gone()
    for number in range(5):
        receiver = bench.listen(address)
        sender = bench.dial(address)
        sender.send([bytes([number])], LONG_S)
        came = take(receiver)
        expect(came == bytes([number]), f"message {number}", came)
        receiver.close()  # before the sender: its connection is still there


def bad_addresses_are_refused(bench: Bench) -> None:
    scheme = bench.case.address.partition("://")[0]
    for address in ("no-such-scheme://127.0.0.1:1", "", scheme, f"{scheme}:/x"):
        error_of(LinkBroken, f"listening at {address!r}", lambda address=address: bench.listen(address))  # type: ignore[misc]  # mypy cannot
        error_of(LinkBroken, f"dialling {address!r}", lambda address=address: bench.dial(address))  # type: ignore[misc]  # mypy cannot
    free = bench.case.address
    error_of(LinkBroken, f"dialling {free!r}, which names nobody", lambda: bench.dial(free))


# ---------------------------------------------------------------- credentials


def a_stranger_gets_nothing_in(bench: Bench) -> None:
    wrong = bench.case.wrong
    if wrong is None:
        raise NotOffered("it asks for no credentials")
    receiver = bench.listen()
    stranger = bench.dial(receiver.address, credentials=wrong)
    error_of(LinkError, "sending with wrong credentials", lambda: stranger.send([b"let me in"], 5 * SHORT_S))
    expect_nothing(receiver, "of a stranger")
    bench.dial(receiver.address).send([b"hello"], LONG_S)
    expect(take(receiver) == b"hello", "a friend's message", "another")


def nothing_is_sent_to_a_stranger(bench: Bench) -> None:
    wrong = bench.case.wrong
    if wrong is None:
        raise NotOffered("it asks for no credentials")
    receiver = bench.listen(credentials=wrong)
    sender = bench.dial(receiver.address)
    error_of(LinkError, "sending to who has wrong credentials", lambda: sender.send([b"secret"], 5 * SHORT_S))
    expect_nothing(receiver, "at a stranger")


CHECKS = (
    parts_arrive_as_one_message,
    every_size_to_the_limit_arrives,
    no_message_is_longer_than_the_limit,
    a_receiver_trusts_its_own_limit_only,
    a_message_belongs_to_who_received_it,
    each_peers_messages_keep_their_order,
    many_threads_may_send_on_one_link,
    a_full_queue_makes_send_wait_and_loses_nothing,
    the_queues_take_what_they_promise,
    receive_times_out_in_time,
    receive_with_no_time_takes_what_is_there,
    a_send_that_times_out_has_sent_nothing,
    dial_returns_at_once_and_the_peer_may_come_later,
    a_successor_at_the_same_address_takes_over,
    closed_links_say_so,
    what_was_sent_before_close_arrives,
    close_ends_a_waiting_receive,
    close_ends_a_waiting_send,
    close_ends_a_send_to_a_peer_that_does_not_read,
    close_in_the_middle_of_traffic_ends_both_sides,
    closing_leaves_no_thread,
    the_bound_address_is_complete,
    a_taken_address_is_refused,
    an_address_is_free_after_close,
    bad_addresses_are_refused,
    a_stranger_gets_nothing_in,
    nothing_is_sent_to_a_stranger,
)
