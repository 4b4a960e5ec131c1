"""Real clusters: the shipped ones, and workers that are processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from prima_core.node.join import JoinOptions, WorkerNode
from prima_core.node.local import LocalNode
from prima_core.node.network import with_port
from prima_core.plugins import Registry
from prima_core.ring.security import format_token
from prima_core.testing import cluster
from prima_core.testing.cluster import DEADLINE_S, NODE, SECRET, until


class Cluster(cluster.Cluster):
    @property
    def local(self) -> Sequence[LocalNode]:
        return self.head._local


@contextmanager
def worker_thread(
    head: str,
    name: str,
    *places: Path,
    secret: bytes = SECRET,
    listen: str | None = None,
    advertise: Callable[[str], str] = str,
) -> Iterator[list[str]]:
    """`prima join` in a thread; gives the lines that it tells."""
    told: list[str] = []
    registry = Registry.load({})
    options = JoinOptions(head, listen or with_port(head, 0), name, places, advertise, NODE)
    worker = WorkerNode(options, registry, secret, told.append)
    thread = threading.Thread(target=worker.run, name=f"worker {name}")
    thread.start()
    try:
        yield told
    finally:
        worker.stop()
        thread.join(DEADLINE_S)
        registry.close()
        assert not thread.is_alive()


@contextmanager
def worker_process(
    head: str, name: str, models: Path, secret: bytes = SECRET, backend: str = "numpy", cache: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`prima join` as a user types it; without a `cache` folder it is as a head starts it."""
    as_child = ["--until-stdin-closes"] if cache is None else []
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "prima_core", "join", head, "--name", name, "--models", str(models)),
            *("--backend", backend, "--threads", "1", *as_child),
        ],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PRIMA_TOKEN": format_token(secret), "XDG_CACHE_HOME": str(cache or "")},
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if cache is not None:
            process.terminate()
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()


@contextmanager
def prima_serve(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`prima serve` that has come as far as serving."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prima_core", "serve", *arguments, "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PRIMA_TOKEN": format_token(SECRET)},
    )
    pipe, said = process.stderr, list[bytes]()
    assert pipe is not None
    reader = threading.Thread(target=lambda: said.extend(iter(pipe.readline, b"")))
    reader.start()
    with pipe:
        try:
            until("serving", lambda: any(b"serving " in line for line in said) or process.poll() is not None)
            assert process.poll() is None, b"".join(said).decode()
            yield process
        finally:
            process.kill()
            process.wait()
            reader.join(DEADLINE_S)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def left_behind(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
