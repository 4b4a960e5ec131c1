"""Round trips between two processes over each transport: `python bench/links.py [--trips N]`.

A child process sends every message back. A round trip is two hops of a ring.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from contextlib import ExitStack

from prima_core.errors import LinkTimeout
from prima_core.interfaces import Credentials, Limits, ReceiveLink, Transport
from prima_nng.transport import NngTransport

ADDRESSES = ("ipc://", "tcp://127.0.0.1:0", "tls+tcp://127.0.0.1:0")
SIZES = (64, 16 * 1024, 1024 * 1024)
CREDENTIALS = Credentials(bytes(32))
LIMITS = Limits()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--trips", type=int, default=2000, help="round trips of each size")
    trips = options.parse_args().trips
    print(f"{'':10}{'bytes':>10}{'p50 us':>10}{'p90 us':>10}{'p99 us':>10}")
    for address in ADDRESSES:
        measure(address, trips)


def measure(address: str, trips: int) -> None:
    scheme = address.partition(":")[0]
    transport = NngTransport(scheme)
    with ExitStack() as exits:
        answers = transport.listen(address, CREDENTIALS, LIMITS)
        exits.callback(answers.close)
        child = multiprocessing.get_context("spawn").Process(target=echo, args=(scheme, address, answers.address))
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
            print(f"{scheme:10}{size:10}{cuts[49]:10.0f}{cuts[89]:10.0f}{cuts[98]:10.0f}", flush=True)


def echo(scheme: str, address: str, answers: str) -> None:
    """The child: tells where it listens, then sends back what comes, until an empty message."""
    transport: Transport = NngTransport(scheme)
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
