"""Round trips between two processes over each transport: `python bench/links.py [--trips N]`.

A child process sends every message back. A round trip is two hops of a ring.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from prima_core.errors import LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, Transport
from prima_nng.transport import NngTransport
from prima_socket.tcp import TcpTransport
from prima_socket.unix import UnixTransport

RIVALS: Mapping[str, tuple[Callable[[], Transport], str]] = {
    "unix": (UnixTransport, "unix://"),
    "tcp": (TcpTransport, "tcp://127.0.0.1:0"),
    "nng ipc": (partial(NngTransport, "ipc"), "ipc://"),
    "nng tcp": (partial(NngTransport, "tcp"), "tcp://127.0.0.1:0"),
    "nng tls+tcp": (partial(NngTransport, "tls+tcp"), "tls+tcp://127.0.0.1:0"),
}
SIZES = (64, 16 * 1024, 1024 * 1024)
CREDENTIALS = Credentials(bytes(32))
LIMITS = Limits()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--trips", type=int, default=2000, help="round trips of each size")
    trips = options.parse_args().trips
    print(f"{'':12}{'bytes':>10}{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}")
    for rival in RIVALS:
        measure(rival, trips)


def measure(rival: str, trips: int) -> None:
    open_, address = RIVALS[rival]
    transport = open_()
    with ExitStack() as exits:
        answers = transport.listen(address, CREDENTIALS, LIMITS)
        exits.callback(answers.close)
        child = multiprocessing.get_context("spawn").Process(target=echo, args=(rival, answers.address))
        child.start()
        exits.callback(child.join)
        questions = transport.dial(str(answers.receive(10.0), "ascii"), CREDENTIALS, LIMITS)
        exits.callback(questions.close)
        exits.callback(questions.send, [b""], 10.0)  # the last of these calls runs first: it ends the child
        for size in SIZES:
            message = bytes(size)
            times_us = []
            for _ in range(max(20, trips * 1024 // max(size, 1024))):
                start = time.perf_counter()
                questions.send([message], 10.0)
                answers.receive(10.0)
                times_us.append((time.perf_counter() - start) * 1e6)
            cuts = statistics.quantiles(times_us, n=100)
            print(f"{rival:12}{size:10}{cuts[49]:10.0f}{cuts[89]:10.0f}{cuts[98]:10.0f}", flush=True)


def echo(rival: str, answers: str) -> None:
    """The child: tells where it listens, then sends back what comes, until an empty message."""
    open_, address = RIVALS[rival]
    transport = open_()
    questions = transport.listen(address, CREDENTIALS, LIMITS)
    back = transport.dial(answers, CREDENTIALS, LIMITS)
    back.send([questions.address.encode()], 10.0)
    while (message := take(questions)).nbytes:
        back.send([message], 10.0)
    back.close()
    questions.close()


def take(link: ReceiveLink) -> memoryview:
    while True:
        try:
            return link.receive(10.0)
        except LinkTimeout:
            continue


if __name__ == "__main__":
    main()
