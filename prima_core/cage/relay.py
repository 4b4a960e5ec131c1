"""`python -m prima_core.cage.relay END:END:SECONDS ...`: hands frames between two network devices on, later. Linux, root.

Every pair is a link: a frame that comes out of one device goes into the other after so many seconds, in both directions.
Says "ready" when all links are open; ends when it is killed.
"""

from __future__ import annotations

import errno
import queue
import socket
import sys
import threading
import time

ALL_PROTOCOLS = 0x0003
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h; Python's socket lacks them
RECEIVE_BUFFER_BYTES = 16 * 2**20
MAX_FRAME_BYTES = 256 * 1024  # the kernel hands over segments of 64 KiB that it has not cut yet
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


class Direction:
    """Frames from one device to another, `delay_s` later, by two threads."""

    def __init__(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        self._source = source
        self._target = target
        self._delay_s = delay_s
        self._waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_WAITING)

    def start(self) -> None:
        for work in (self._receive, self._send):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _receive(self) -> None:
        while True:
            frame = self._source.recv(MAX_FRAME_BYTES)
            self._waiting.put((time.monotonic() + self._delay_s, frame))

    def _send(self) -> None:
        while True:
            due_s, frame = self._waiting.get()
            early_s = due_s - time.monotonic()
            if early_s > 0:
                time.sleep(early_s)
            try:
                self._target.send(frame)
            except OSError as error:
                if error.errno not in NO_ROOM:  # then it is dropped, as a switch does; TCP sends it again
                    raise


def main() -> None:
    for link in sys.argv[1:]:
        one, other, delay_s = link.split(":")
        ends = open_device(one), open_device(other)
        for source, target in (ends, ends[::-1]):
            Direction(source, target, float(delay_s)).start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
