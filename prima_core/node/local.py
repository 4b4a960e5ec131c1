"""More nodes on the head's own machine: child processes, or threads for the in-process transport.

A child is spawned, never forked. It holds the other end of a pipe as its standard input: when the parent ends in
any way, also by SIGKILL, the pipe closes and the child leaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prima_core.errors import PrimaError
from prima_core.node.join import JoinOptions, WorkerNode
from prima_core.node.lastwords import meaning_of
from prima_core.node.network import with_port
from prima_core.node.node import NodeOptions
from prima_core.plugins import Registry
from prima_core.ring.security import format_token

STOP_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """`n` more nodes that join `head` with the same model file and node options."""

    n: int
    head: str
    name: str
    model: Path
    node: NodeOptions
    log_level: str


class LocalNode(Protocol):
    @property
    def fault(self) -> str | None:
        """Why it has ended by itself, if it has."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...

    def abandon(self) -> None:
        """For a process that ends without `close`: remove what the node leaves behind when it leaves, too."""
        ...


def start_local(
    options: LocalOptions, registry: Registry, secret: bytes, tell: Callable[[str], None]
) -> Sequence[LocalNode]:
    """Start the nodes; threads where the head's address is in-process, processes otherwise."""
    names = [f"{options.name}.{index}" for index in range(2, options.n + 2)]
    if options.head.startswith("inproc://"):
        return [ThreadNode(options, name, registry, secret, tell) for name in names]
    return [ProcessNode(options, name, secret) for name in names]


class ThreadNode:
    """A worker node in a thread of this process."""

    def __init__(
        self, options: LocalOptions, name: str, registry: Registry, secret: bytes, tell: Callable[[str], None]
    ) -> None:
        listen = with_port(options.head, 0)
        join = JoinOptions(options.head, listen, name, (options.model,), node=options.node)
        self._worker = WorkerNode(join, registry, secret, lambda line: tell(f"{name}: {line}"))
        self.fault: str | None = None
        self._name = name
        self._thread = threading.Thread(target=self._run, name=f"prima-node-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.run()
        except PrimaError as error:
            self.fault = f"node {self._name} ended: {error}"

    def close(self) -> None:
        self._worker.stop()
        self._thread.join(STOP_WITHIN_S)

    def abandon(self) -> None:
        """It goes with this process."""


class ProcessNode:
    """A worker node in a child process (`prima join`)."""

    def __init__(self, options: LocalOptions, name: str, secret: bytes) -> None:
        self._name = name
        # Its sockets lie in a folder of ours, so that they go also when it is killed.
        self._folder = tempfile.TemporaryDirectory(prefix="prima-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            _command(options, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**_own_environment(), "PRIMA_TOKEN": format_token(secret), "TMPDIR": self._folder.name},
            start_new_session=True,  # Ctrl-C in a terminal is for the head, which ends its children in order
        )

    @property
    def fault(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return f"node {self._name} (process {self._process.pid}) ended with code {code}{meaning_of(code)}"

    def close(self) -> None:
        """Let it leave by itself, then make it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def abandon(self) -> None:
        self._folder.cleanup()


def _command(options: LocalOptions, name: str) -> list[str]:
    node = options.node
    return [
        *(sys.executable, "-P", "-m", "prima_core", "join", options.head),  # -P: not what lies in this folder
        *("--listen", with_port(options.head, 0)),
        *("--name", name),
        *("--model", str(options.model)),
        *("--backend", node.backend),
        *("--threads", str(node.threads)),
        *("--kernels", node.kernels),
        *("--memory", str(node.memory)),
        *("--log-level", options.log_level),
        "--until-stdin-closes",
    ]


def _own_environment() -> dict[str, str]:
    """The environment without settings that are the head's alone: the command line carries the node's."""
    return {name: value for name, value in os.environ.items() if name not in _HEADS_OWN}


_HEADS_OWN = frozenset({"PRIMA_ADVERTISE", "PRIMA_MODELS", "PRIMA_TOKEN_FILE", "PRIMA_API_KEY"})


def leave_when_stdin_closes(stop: Callable[[], None]) -> None:
    """Call `stop` when the parent has gone; in a thread of its own."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        stop()

    threading.Thread(target=watch, name="prima-parent-watch", daemon=True).start()


def close_all(nodes: Sequence[LocalNode]) -> None:
    """Close all at once, so that the slowest decides how long it takes."""
    threads = [threading.Thread(target=node.close, daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2 * STOP_WITHIN_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
