"""`python -m prima_core.cage.relay END:END:SECONDS:BITS_PER_S ...`: links that are slow. For Linux, as root.

Each is a pair of network devices: a frame that comes out of one goes into the other, both ways, after so many seconds,
and not faster than the rate (0: any). Says "ready" when all links are open; ends when it is killed.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable

ALL_PROTOCOLS = 0x0003
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h; Python's socket lacks them
RECEIVE_BUFFER_BYTES = 16 * 2**20
HEADER_BYTES = 10  # struct virtio_net_hdr
MAX_FRAME_BYTES = 256 * 1024  # the kernel hands over segments of 64 KiB that it has not cut yet
MAX_WAITING_S = 0.2
"""What would wait longer behind others is dropped, as a switch does; TCP sends it again."""

MAX_WAITING = 65536
NO_ROOM = (errno.ENOBUFS, errno.EAGAIN)


def open_device(name: str) -> socket.socket:
    """All frames that arrive at a device, and a way to send through it. Raises OSError.

    With PACKET_VNET_HDR what the kernel left undone (checksums, cutting segments) is told in front of each frame, and
    taken back as it is.
    """
    if sys.platform != "linux":
        raise OSError("only Linux has packet sockets")
    device = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # silent until it is bound
    device.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    device.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (33, 32):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE: past the limit for users
        device.setsockopt(socket.SOL_SOCKET, option, RECEIVE_BUFFER_BYTES)
    device.bind((name, ALL_PROTOCOLS))
    return device


class Pace:
    """When frames are through: one after the other at `bits_s` (0: at once), each `delay_s` later than that."""

    def __init__(self, delay_s: float, bits_s: float) -> None:
        self._delay_s = delay_s
        self._s_per_byte = 8 / bits_s if bits_s else 0.0
        self._free_s = 0.0

    def due_s(self, n_bytes: int, now_s: float) -> float | None:
        """None: too many wait already, this one is dropped."""
        begin_s = max(self._free_s, now_s)
        if begin_s - now_s > MAX_WAITING_S:
            return None
        self._free_s = begin_s + n_bytes * self._s_per_byte
        return self._free_s + self._delay_s


class Direction:
    """Frames from one device to another, at their pace, by two threads."""

    def __init__(self, source: socket.socket, target: socket.socket, pace: Pace) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_WAITING)

    def start(self) -> None:
        for work in (self._receive, self._send):
            threading.Thread(target=_ending_all, args=(work,), name=work.__name__, daemon=True).start()

    def _receive(self) -> None:
        while True:
            frame = self._source.recv(MAX_FRAME_BYTES)
            due_s = self._pace.due_s(len(frame) - HEADER_BYTES, time.monotonic())
            if due_s is not None:
                self._waiting.put((due_s, frame))

    def _send(self) -> None:
        while True:
            due_s, frame = self._waiting.get()
            early_s = due_s - time.monotonic()
            if early_s > 0:
                time.sleep(early_s)
            try:
                self._target.send(frame)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise


def _ending_all(work: Callable[[], None]) -> None:
    """A relay that has lost a thread would be a link that is silently cut."""
    try:
        work()
    except OSError as error:
        print(f"the relay has failed: {error}", flush=True)
    finally:
        os._exit(1)


def main() -> None:
    for link in sys.argv[1:]:
        one, other, delay_s, bits_s = link.split(":")
        ends = open_device(one), open_device(other)
        for source, target in (ends, ends[::-1]):
            Direction(source, target, Pace(float(delay_s), float(bits_s))).start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
