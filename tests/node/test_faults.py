"""Nodes that die, hang, come late, or should not be there: with real processes wherever a signal is the fault."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest

from prima_core.arch.families import open_model
from prima_core.errors import ClusterError, LinkTimeout
from prima_core.interfaces import Buffer
from prima_core.model.weights import Model
from prima_core.node import driver, join, local, watch
from prima_core.node.driver import State
from prima_core.node.local import ProcessNode
from prima_core.ring import control, membership
from prima_core.ring.control import Channel
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import DEADLINE_S, plan_of, until
from prima_inproc.transport import InprocSendLink
from tests.node.cluster import (
    Cluster,
    free_port,
    has_ended,
    left_behind,
    prima_serve,
    worker_process,
    worker_thread,
)
from tests.node.conftest import N_LAYERS, PROMPTS, Tokens

Start = Callable[..., Cluster]
PROMPT = PROMPTS["short"]
LONG = 3000  # tokens: some seconds
F32 = WirePolicy.F32


pytestmark = pytest.mark.usefixtures("temporary_folder")


def child(cluster: Cluster) -> psutil.Process:
    """The process of the first local node."""
    node = cluster.local[0]
    assert isinstance(node, ProcessNode)
    return psutil.Process(node._process.pid)


# ---------------------------------------------------------------- workers that die


@pytest.mark.parametrize("transport", ["unix://", "tcp://127.0.0.1:0", "ipc://", "tls+tcp://127.0.0.1:0"])
@pytest.mark.parametrize("fault", [psutil.Process.kill, psutil.Process.suspend], ids=["killed", "hangs"])
def test_a_worker_that_dies_ends_what_runs_and_the_others_go_on(
    cluster: Start, one_node: Tokens, llama: Model, fault: Callable[[psutil.Process], None], transport: str
) -> None:
    head = cluster(llama, listen=transport, n_local=2, wire=F32)
    head.until_serving_with("head", "head.2", "head.3")
    running = head.ask(PROMPT, LONG)
    for _ in range(5):
        running.take()
    fault(child(head))
    error = running.error()
    assert isinstance(error, ClusterError)
    assert "node 'head.2' was lost: nothing was heard of it" in str(error)
    head.until_serving_with("head", "head.3")
    assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


def test_a_worker_that_was_only_asleep_comes_back(cluster: Start, one_node: Tokens, llama: Model) -> None:
    head = cluster(llama, listen="ipc://", n_local=1, wire=F32)
    head.until_serving_with("head", "head.2")
    child(head).suspend()
    head.until_serving_with("head")
    child(head).resume()
    head.until_serving_with("head", "head.2")
    assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


def test_a_worker_that_was_killed_has_its_name_back_at_once(
    cluster: Start, llama: Model, models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before silence tells that it has gone."""
    monkeypatch.setattr(membership, "LOST_AFTER_S", 3600.0)
    head = cluster(llama, listen="tcp://127.0.0.1:0")
    with worker_process(head.address, "desk", models_folder, cache=tmp_path) as first:
        head.until_serving_with("head", "desk")
        first.kill()
        first.wait(DEADLINE_S)
        with worker_process(head.address, "desk", models_folder, cache=tmp_path):
            until("joining again", lambda: "node desk was lost: it joined again" in head.told)
            head.until_serving_with("head", "desk")


def test_a_killed_worker_leaves_nothing_behind(cluster: Start, llama: Model, temporary_folder: Path) -> None:
    head = cluster(llama, listen="ipc://", n_local=1)
    head.until_serving_with("head", "head.2")
    child(head).kill()
    head.until_serving_with("head")
    head.head.close()
    assert left_behind(temporary_folder) == []


def test_a_node_that_ends_before_it_has_joined_is_told(
    cluster: Start, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_command", lambda options, name: [sys.executable, "-c", "raise SystemExit(7)"])
    head = cluster(llama, listen="ipc://", n_local=1)
    with pytest.raises(ClusterError, match=r"node head\.2 .* ended with code 7"):
        head.head.wait_until_serving()


def test_when_no_plan_fits_what_is_left_new_requests_hear_why_until_a_node_returns(
    cluster: Start, one_node: Tokens, llama: Model
) -> None:
    """The plan file names a node without which it cannot be."""
    plan = plan_of(("head", 0, 4), ("w", 4, N_LAYERS))
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=plan, wire=F32)
    with worker_thread(head.address, "w", llama.path):
        head.until_serving_with("head", "w")
    until("waiting for the node", lambda: head.status.state is State.WAITING)
    assert "node 'w' is not in the cluster" in str(head.ask(PROMPT, 5).error())
    with worker_thread(head.address, "w", llama.path):
        head.until_serving_with("head", "w")
        assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


# ---------------------------------------------------------------- workers that come


def test_a_late_worker_enters_when_nothing_runs(cluster: Start, one_node: Tokens, llama: Model) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", wire=F32)
    head.until_serving_with("head")
    running = head.ask(PROMPT, LONG)
    running.take()
    with worker_thread(head.address, "late", llama.path):
        until("the worker's joining", lambda: len(head.status.members) == 2)
        tokens_by_then = len(running.tokens)
        for _ in range(5):
            running.take()
        assert (running.end, len(running.tokens)) == (None, tokens_by_then + 5)
        assert head.serves_with("head")
        running.cancel()
        head.until_serving_with("head", "late")
        assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


def test_a_worker_with_another_model_is_refused_by_name_and_the_head_goes_on(
    cluster: Start, llama: Model, open_models: dict[str, Model]
) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    with worker_thread(head.address, "stranger", open_models["qwen2"].path) as told:
        head.until_serving_with("head")
        refusal = f"model 'llama' ({llama.file.size} bytes) was not found"
        assert any(refusal in line for line in told)
    assert len(head.tokens(PROMPT, 5)) == 5


def test_a_refused_worker_enters_when_it_joins_again_with_the_model(cluster: Start, llama: Model) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    with worker_thread(head.address, "w", Path("nowhere.gguf")):
        head.until_serving_with("head")
    with worker_thread(head.address, "w", llama.path):
        head.until_serving_with("head", "w")


def test_the_reason_is_told_when_nothing_goes_without_the_refused_worker(cluster: Start, llama: Model) -> None:
    plan = plan_of(("head", 0, 4), ("w", 4, N_LAYERS))
    head = cluster(llama, listen="tcp://127.0.0.1:0", plan=plan)
    with worker_thread(head.address, "w", Path("nowhere.gguf")):
        until("the refusal", lambda: "cannot serve" in head.status.reason)
        assert "node 'w' cannot serve: model 'llama'" in head.status.reason


def test_a_worker_that_looks_for_its_model_for_long_is_not_lost(
    cluster: Start, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = threading.Event()

    def find_slowly(wanted: object, places: object) -> Path:
        assert found.wait(DEADLINE_S)
        return llama.path

    monkeypatch.setattr(join, "find_by_fingerprint", find_slowly)
    monkeypatch.setattr(membership, "LOST_AFTER_S", 1.0)
    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    with worker_thread(head.address, "w"):
        until("loading", lambda: head.status.state is State.LOADING)
        joined_s = time.monotonic()
        until("a time in which silence is noticed", lambda: time.monotonic() > joined_s + 1.5)
        assert len(head.status.members) == 2
        found.set()
        head.until_serving_with("head", "w")


# ---------------------------------------------------------------- files that change


@pytest.fixture
def copied(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model that may be spoilt; it is looked at often."""
    for module in (join, watch):
        monkeypatch.setattr(module, "CHECK_FILES_EVERY_S", 0.05)
    return Path(shutil.copy(llama.path, tmp_path / "copy.gguf"))


def test_a_worker_whose_file_changes_leaves_and_says_why(
    cluster: Start, one_node: Tokens, llama: Model, copied: Path
) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2, wire=F32)
    with worker_thread(head.address, "w", copied) as told:
        head.until_serving_with("head", "w")
        running = head.ask(PROMPT, LONG)
        running.take()
        os.utime(copied, ns=(0, 0))
        assert "node 'w' cannot serve: file: " in str(running.error())
        head.until_serving_with("head")
        assert any("cannot take part" in line and "copy.gguf was changed or replaced" in line for line in told)
        assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)
    with worker_thread(head.address, "w", copied):  # the same model, but with another time
        head.until_serving_with("head", "w")


def test_a_head_whose_file_goes_away_serves_no_more_and_says_why(cluster: Start, copied: Path) -> None:
    with open_model(copied) as model:
        head = cluster(model)
        head.until_serving_with("head")
        running = head.ask(PROMPT, LONG)
        running.take()
        copied.unlink()
        reason = f"{copied} went away while it was in use"
        assert reason in str(running.error())
        until("the end of service", lambda: not head.head.health()[0])
        assert reason in str(head.head.health()[1]["reason"])
        assert reason in str(head.ask(PROMPT, 5).error())
        assert any(reason in line for line in head.told)
        head.head.close()


def test_files_that_stay_as_they_are_are_served_on(
    cluster: Start, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Semaphore(0)
    really = Model.check_unchanged

    def spied(model: Model) -> None:
        really(model)
        looked.release()

    monkeypatch.setattr(Model, "check_unchanged", spied)
    with open_model(copied) as model:
        head = cluster(model)
        head.until_serving_with("head")
        for _ in range(5):
            assert looked.acquire(timeout=DEADLINE_S)
        assert len(head.tokens(PROMPT, 5)) == 5
        head.head.close()


@pytest.mark.parametrize("kind", [control.Assign, control.Ready], ids=["an order of the head", "the worker's answer"])
def test_when_words_do_not_arrive_the_worker_joins_anew(
    cluster: Start, llama: Model, monkeypatch: pytest.MonkeyPatch, kind: type[control.Message]
) -> None:
    """Otherwise each would wait for the other, for ever, with heartbeats going to and fro."""
    monkeypatch.setattr(join, "HEAD_LOST_AFTER_S", 1.0)
    lost: list[control.Message] = []
    send = Channel.send

    def send_or_lose(channel: Channel, message: control.Message, timeout_s: float) -> None:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            raise LinkTimeout("the connection was just broken")
        send(channel, message, timeout_s)

    monkeypatch.setattr(Channel, "send", send_or_lose)
    head = cluster(llama, listen="inproc://", n_local=1)
    head.until_serving_with("head", "head.2")
    assert len(lost) == 1


def test_a_worker_may_listen_at_a_port_of_the_users_choice(cluster: Start, llama: Model) -> None:
    """Its second link, for frames, takes any other port."""
    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2)
    with worker_thread(head.address, "w", llama.path, listen=f"tcp://127.0.0.1:{free_port()}"):
        head.until_serving_with("head", "w")


# ---------------------------------------------------------------- frames that never arrive


def test_a_worker_that_no_frame_reaches_is_left_out(
    cluster: Start, one_node: Tokens, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall, say, that lets the control plane through."""
    monkeypatch.setattr("prima_core.ring.carry.UNREACHABLE_AFTER_S", 0.2)
    addresses: list[str] = []

    def advertise(bound: str) -> str:
        addresses.append(bound)
        return bound if len(addresses) % 2 else f"tcp://127.0.0.1:{free_port()}"  # of two, the second is for frames

    head = cluster(llama, listen="tcp://127.0.0.1:0", wait=2, wire=F32)
    with worker_thread(head.address, "walled", llama.path, advertise=advertise):
        head.until_serving_with("head", "walled")
        error = head.ask(PROMPT, 5).error()
        assert "node 'walled' cannot serve: no connection to tcp://127.0.0.1:" in str(error)
        head.until_serving_with("head")
        assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


def test_a_frame_that_is_lost_on_its_way_ends_its_request_and_no_other(
    cluster: Start, one_node: Tokens, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks takes with it what was under way; both ends live on."""
    monkeypatch.setattr(driver, "PROBE_AFTER_S", 0.2)
    head = cluster(llama, listen="inproc://", n_local=1, wire=F32)
    head.until_serving_with("head", "head.2")
    to_lose = [1]
    send = InprocSendLink.send

    def send_or_lose(link: InprocSendLink, parts: Iterable[Buffer], timeout_s: float) -> None:
        message = b"".join(parts)
        if message.startswith(b"PRMA") and to_lose:
            to_lose.pop()
        else:
            send(link, [message], timeout_s)

    monkeypatch.setattr(InprocSendLink, "send", send_or_lose)
    assert "lost between the nodes" in str(head.ask(PROMPT, 24).error())
    assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


# ---------------------------------------------------------------- the token


def test_a_worker_says_what_it_computes_on(cluster: Start, llama: Model) -> None:
    head = cluster(llama, listen="tcp://127.0.0.1:0", wire=F32)
    with worker_thread(head.address, "friend", llama.path) as told:
        head.until_serving_with("head", "friend")
    assert told[0].startswith("computing on numpy:cpu")


@pytest.mark.parametrize("scheme", ["tcp", "tls+tcp"])
def test_only_who_has_the_token_joins(
    cluster: Start, one_node: Tokens, llama: Model, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(join, "HELLO_EVERY_S", 0.05)
    monkeypatch.setattr(join, "SEND_TIMEOUT_S", 0.05)
    head = cluster(llama, listen=f"{scheme}://127.0.0.1:0", wire=F32)
    with (
        worker_thread(head.address, "stranger", llama.path, secret=b"x" * 32) as told,
        worker_thread(head.address, "friend", llama.path),
    ):
        head.until_serving_with("head", "friend")
        until("the stranger's giving up hope", lambda: any("no answer" in line for line in told))
        assert [member.name for member in head.status.members] == ["head", "friend"]
        assert head.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)


# ---------------------------------------------------------------- heads that die


def test_the_local_nodes_of_a_killed_head_leave(models_folder: Path) -> None:
    with prima_serve(str(models_folder / "llama.gguf"), "--nodes", "3") as head:
        children = psutil.Process(head.pid).children()
        assert len(children) == 2
        head.kill()
        for child in children:
            until(f"the end of {child}", lambda child=child: has_ended(child), deadline_s=5)  # type: ignore[misc]


def test_a_worker_waits_for_its_head_to_come_back(
    cluster: Start, one_node: Tokens, llama: Model, models_folder: Path
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with worker_process(address, "w", models_folder) as worker:
        with prima_serve(str(llama.path), "--listen", address, "--wait", "2") as first:
            first.kill()
        second = cluster(llama, listen=address, wait=2, wire=F32)
        second.until_serving_with("head", "w")
        assert second.tokens(PROMPT, 24) == one_node("llama", PROMPT, 24)
        assert worker.poll() is None


# ---------------------------------------------------------------- the end


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("transport", ["ipc", "tcp", "tls+tcp"])
def test_ctrl_c_ends_every_process_and_leaves_nothing_behind(
    models_folder: Path, temporary_folder: Path, transport: str
) -> None:
    with prima_serve(str(models_folder / "llama.gguf"), "--nodes", "3", "--transport", transport) as head:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        assert len(family) >= 3
        head.send_signal(signal.SIGINT)
        head.wait(DEADLINE_S)
        assert all(has_ended(process) for process in family)
    assert left_behind(temporary_folder) == []
