"""What the head and every worker have in common: an owner thread that computes, and a data link that feeds it.

Start reading here: `head.py` puts an engine and a planner on top of a Node, `join.py` a session with a head.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from prima_core.errors import ConfigError, LinkError, LinkTimeout
from prima_core.interfaces import Backend, BackendOptions, Credentials, Device, Limits, ReceiveLink, SendLink
from prima_core.memory.governor import room_bytes
from prima_core.memory.system import host
from prima_core.plugins import Registry
from prima_core.ring.probes import Probes, is_probe
from prima_core.ring.reports import Report
from prima_core.ring.worker import Worker

log = logging.getLogger(__name__)

DATA_LIMITS = Limits(max_message_bytes=64 * 1024 * 1024, max_queued=64)
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What the user chose for a node. `memory_bytes` None: what is available now, but for a reserve that others are
    left, split over `n_sharing`."""

    backend: str = "auto"
    threads: int = 0
    kernels: str = "auto"
    memory_bytes: int | None = None
    n_sharing: int = 1

    @property
    def memory(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        return room_bytes(host().memory(), self.n_sharing)


class Dialer:
    """Opens links to addresses of any scheme, all with the same credentials."""

    def __init__(self, registry: Registry, credentials: Credentials, limits: Limits) -> None:
        self._registry = registry
        self._credentials = credentials
        self._limits = limits

    def listen(self, address: str) -> ReceiveLink:
        return self._registry.transport(address).listen(address, self._credentials, self._limits)

    def dial(self, address: str) -> SendLink:
        return self._registry.transport(address).dial(address, self._credentials, self._limits)


class Node:
    """A worker thread and its data link. `report` is called from the worker's thread."""

    def __init__(
        self,
        name: str,
        registry: Registry,
        options: NodeOptions,
        dialer: Dialer,
        data_address: str,
        report: Callable[[Report], None],
    ) -> None:
        self.devices: tuple[Device, ...] = ()  # these three are known after `start`
        self.data_address = ""
        self.explanation = ""
        self._registry = registry
        self._options = options
        self._dialer = dialer
        self._listen_address = data_address
        self.worker = Worker(name, self._open_backend, dialer.dial, report, host())
        self.probes = Probes(dialer.dial)
        self._stopping = threading.Event()
        self._exits = ExitStack()

    def start(self) -> None:
        """Open link and backend. Raises PluginError when the one that was asked for does not work here, LinkError."""
        with ExitStack() as exits:
            link = self._dialer.listen(self._listen_address)
            exits.callback(link.close)
            self.devices = self.worker.start()
            receiver = threading.Thread(
                target=self._receive, args=(link,), name=f"prima-receive-{self.worker.name}", daemon=True
            )
            receiver.start()
            exits.callback(receiver.join)
            exits.callback(self.probes.close)
            self.data_address = link.address
            self._exits = exits.pop_all()

    def close(self) -> None:
        """End its threads. Idempotent."""
        self._stopping.set()
        self.worker.stop()  # first: the receiver may wait for it to take a frame
        self._exits.close()

    def _open_backend(self) -> Backend:
        options = BackendOptions(threads=self._options.threads, kernels=self._options.kernels)
        backend, self.explanation = self._registry.open_backend(self._options.backend, options, None)
        log.info("%s", self.explanation)
        return backend

    def _receive(self, link: ReceiveLink) -> None:
        while not self._stopping.is_set():
            self.probes.let_go()
            try:
                data = link.receive(POLL_S)
                (self.probes if is_probe(data) else self.worker).arrived(data)
            except LinkTimeout:
                pass
            except LinkError as error:
                log.error("the data link failed: %s", error)
                return


def longest_chunk(n_columns: int) -> int:
    """Tokens of the longest prefill chunk whose activations (or logits), in f32, surely fit a message."""
    return DATA_LIMITS.max_message_bytes // 2 // (4 * n_columns)


def parse_bytes(text: str) -> int:
    """Bytes of "4GB", "500MB", "1.5GiB" or a plain number. Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size", hint="write it like 4GB or 500MiB")
    return size
