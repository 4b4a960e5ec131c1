"""Disks that fail, and files that are cut, under nodes whose weights come from disk in every pass."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prima_core.errors import ClusterError
from prima_core.memory.system import DirectFile, host
from prima_core.model.weights import Model
from prima_core.node.driver import State
from prima_core.plan.plan import plan_to_json
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import DEADLINE_S, until
from tests.node.cluster import Cluster, has_ended, left_behind, prima_serve, worker_process, worker_thread
from tests.node.conftest import N_LAYERS, PROMPTS, Tokens
from tests.node.streaming import streaming_plan

Start = Callable[..., Cluster]
PROMPT = PROMPTS["short"]
LONG = 3000  # tokens: some seconds
F32 = WirePolicy.F32
WITH_W = [("head", 0, 4), ("w", 4, 6), ("head", 6, N_LAYERS)]

pytestmark = pytest.mark.usefixtures("temporary_folder")


class Disks:
    """While a path is in `broken`, reads of that file past the page cache fail."""

    def __init__(self) -> None:
        self.broken: set[Path] = set()


class BreakableFile:
    def __init__(self, disks: Disks, path: Path, file: DirectFile) -> None:
        self._disks, self._path, self._file = disks, path, file

    @property
    def alignment(self) -> int:
        return self._file.alignment

    def read(self, into: memoryview, offset: int) -> int:
        if self._path in self._disks.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._file.read(into, offset)

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Disks:
    """Of this process."""
    disks = Disks()
    kind = type(host())
    really = kind.open_direct
    monkeypatch.setattr(kind, "open_direct", lambda self, path: BreakableFile(disks, path, really(self, path)))
    return disks


@pytest.fixture
def copied(llama: Model, tmp_path: Path) -> Path:
    return Path(shutil.copy(llama.path, tmp_path / "copy.gguf"))


def test_a_workers_disk_that_fails_ends_requests_with_its_name_and_the_worker_is_left_out_till_it_joins_again(
    cluster: Start, one_node: Tokens, llama: Model, copied: Path, disks: Disks
) -> None:
    plan = streaming_plan(llama, WITH_W, {"w": 1.0}, rows=50)
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=plan, wire=F32)
    with worker_thread(head.address, "w", copied) as told:
        head.until_serving_with("head", "w")
        running = head.ask(PROMPT, LONG)
        running.take()
        disks.broken.add(copied)
        error = running.error()
        assert isinstance(error, ClusterError)
        for part in ("node 'w'", str(copied), "Input/output error"):
            assert part in str(error)
        until("waiting", lambda: head.status.state is State.WAITING)
        assert f"node 'w' cannot serve: file: {copied} cannot be read" in head.status.reason
        assert "Input/output error" in str(head.ask(PROMPT, 5).error())
        assert any("cannot take part" in line and str(copied) in line for line in told)
    disks.broken.clear()
    with worker_thread(head.address, "w", copied):
        head.until_serving_with("head", "w")
        assert head.tokens(PROMPT, 12) == one_node("llama", PROMPT, 12)


def test_the_heads_disk_that_fails_for_a_while_ends_the_requests_of_that_while(
    cluster: Start, one_node: Tokens, llama: Model, disks: Disks
) -> None:
    head = cluster(llama, plan=streaming_plan(llama, [("head", 0, N_LAYERS)], {"head": 1.0}, rows=50))
    head.until_serving_with("head")
    disks.broken.add(llama.path)
    for _ in range(2):
        error = head.ask(PROMPT, LONG).error()
        assert f"node 'head': file: {llama.path} cannot be read" in str(error)
    disks.broken.clear()
    assert head.tokens(PROMPT, 12) == one_node("llama", PROMPT, 12)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cuts no file that is mapped")
def test_a_workers_file_that_is_cut_while_it_is_read_is_told_by_name(
    cluster: Start, one_node: Tokens, llama: Model, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = streaming_plan(llama, WITH_W, {"w": 1.0}, rows=50)
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=plan, wire=F32)
    last = llama.file.tensors["blk.5.ffn_down.weight"]
    with worker_process(head.address, "w", copied.parent) as worker:
        head.until_serving_with("head", "w")
        running = head.ask(PROMPT, LONG)
        running.take()
        os.truncate(copied, last.offset + last.n_bytes // 2)  # behind all that stays in memory
        error = running.error()
        for part in ("node 'w'", str(copied)):
            assert part in str(error)
        until("waiting", lambda: head.status.state is State.WAITING)
        assert worker.poll() is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cuts no file that is mapped")
def test_a_head_lives_on_when_all_of_a_workers_file_goes(cluster: Start, llama: Model, copied: Path) -> None:
    """What the worker had mapped is gone: it may end by a signal before it can say why."""
    plan = streaming_plan(llama, WITH_W, {"w": 0.5}, rows=50)
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=plan, wire=F32)
    with worker_process(head.address, "w", copied.parent):
        head.until_serving_with("head", "w")
        running = head.ask(PROMPT, LONG)
        running.take()
        os.truncate(copied, 0)
        assert "node 'w'" in str(running.error())
        until("waiting", lambda: head.status.state is State.WAITING)
        assert "'w'" in str(head.ask(PROMPT, 5).error())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_nodes_that_stream_and_leaves_nothing_behind(
    llama: Model, temporary_folder: Path, tmp_path: Path
) -> None:
    visits = [("head", 0, 2), ("head.2", 2, 4), ("head", 4, 6), ("head.2", 6, N_LAYERS)]
    plan = tmp_path / "plan.json"
    plan.write_bytes(plan_to_json(streaming_plan(llama, visits, {"head": 1.0, "head.2": 1.0}, rows=50)))
    with prima_serve(str(llama.path), "--nodes", "2", "--name", "head", "--plan", str(plan)) as head:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.send_signal(signal.SIGINT)
        head.wait(DEADLINE_S)
        assert all(has_ended(process) for process in family)
    assert left_behind(temporary_folder) == []
