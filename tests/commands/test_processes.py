"""The program as a process: how it starts, serves, is interrupted, and what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from prima_core.ring.security import format_token, new_secret
from tests.commands.conftest import SIGNALS, Program, Start
from tests.site import Site

ENDS = [signal.SIGINT, *SIGNALS]
POLITE = [signal.SIGINT, signal.SIGTERM]  # at which a server tells its clients
DEADLINE_S = 20.0


def ends_with(program: Program, number: signal.Signals, code: int) -> str:
    """Send the signal; what was printed to standard error until the end."""
    children = psutil.Process(program.process.pid).children(recursive=True)
    program.process.send_signal(number)
    ended = program.end(DEADLINE_S)
    assert ended.code == code, ended.err
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert [path for path in program.folder.iterdir() if path.name.startswith("prima")] == []  # sockets
    assert "Traceback" not in ended.err
    return ended.err


# ---------------------------------------------------------------- run and chat


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("n_nodes", [1, 3])
def test_a_run_is_ended_in_order(start: Start, talkative: Path, n_nodes: int, number: signal.Signals) -> None:
    program = start("run", talkative, "-p", "hello", "--temp", 0, "--nodes", n_nodes)
    assert program.read_out(10)
    ends_with(program, number, 130)


def test_a_run_is_ended_while_it_loads(start: Start, talkative: Path) -> None:
    program = start("run", talkative, "-p", "hello", "--nodes", 3)
    program.read_err_until("joined")
    ends_with(program, signal.SIGINT, 130)


STUCK = """
import atexit, os, sys, threading

class Backend:
    def devices(self): return [Device("stuck:cpu", 10**10)]
    def describe(self): return {}
    def load(self, model, device, part, store):
        # What C++ does with a thread that is in it when the interpreter ends.
        atexit.register(lambda: (sys.stderr.flush(), os.abort()))
        print("stuck in native code", file=sys.stderr, flush=True)
        threading.Event().wait()
    def close(self): pass

@hookimpl
def prima_backends():
    return [BackendPlugin("stuck", 1, lambda: Probe(usable=True), lambda options: Backend())]
"""


def test_a_load_that_cannot_be_stopped_is_left_behind(
    start: Start, tiny: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("stuck", STUCK)
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    program = start("run", tiny, "-p", "hello", "--backend", "stuck")
    program.read_err_until("stuck in native code")
    ends_with(program, signal.SIGINT, 130)


def test_local_nodes_do_not_import_what_lies_in_the_current_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "http.py").write_text("raise SystemExit('not ours')")
    command = [sys.executable, "-P", "-m", "prima_core", "run", str(tiny), "-p", "hello", "-n", "1", "--nodes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_chat_with_piped_input_is_ended_by_ctrl_c(start: Start, talkative: Path) -> None:
    program = start("chat", talkative, "--temp", 0)
    program.say(b"hello\n")
    assert program.read_out(10)
    ends_with(program, signal.SIGINT, 130)


def test_a_chat_that_waits_for_input_is_ended_by_ctrl_c(start: Start, tiny: Path) -> None:
    program = start("chat", tiny)
    program.read_err_until("/new")
    ends_with(program, signal.SIGINT, 130)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_chat(talkative: Path) -> None:
    if sys.platform == "win32":
        raise AssertionError("these tests use pseudo terminals")
    ours, its = os.openpty()
    command = [sys.executable, "-m", "prima_core", "chat", str(talkative), "--temp", "0"]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=subprocess.DEVNULL) as process:
        os.close(its)
        screen = b""

        def read_until(text: bytes) -> None:
            nonlocal screen
            while text not in screen:
                screen += os.read(ours, 1024)

        read_until(b"> ")
        os.write(ours, b"hello\n")
        read_until(b"hello\r\n")
        screen = os.read(ours, 1024)  # the answer has begun
        process.send_signal(signal.SIGINT)
        read_until(b"\r\n> ")
        os.write(ours, b"/exit\n")
        assert process.wait(DEADLINE_S) == 0
    os.close(ours)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("arguments", [("run", "-p", "hello", "--temp", 0), ("chat",)])
def test_a_reader_that_has_read_enough_is_no_error_to_shout_about(
    start: Start, talkative: Path, arguments: tuple[object, ...]
) -> None:
    program = start(*arguments, talkative)
    program.say(b"hello\n")
    assert program.read_out(1)
    assert program.process.stdout is not None
    program.process.stdout.close()
    assert program.process.wait(DEADLINE_S) == 1
    assert program.process.stderr is not None
    assert b"Traceback" not in program.process.stderr.read()


def test_only_results_go_to_standard_output(start: Start, tiny: Path) -> None:
    program = start("run", tiny, "-p", "hello", "-n", 3, "--nodes", 2, "--json", "--log-level", "debug")
    ended = program.end()
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 1
    assert len(ended.json["generated_ids"]) == 3
    assert "INFO" in ended.err


# ---------------------------------------------------------------- serve


def served_at(program: Program) -> str:
    found = re.search(r"at (http://\S+)/v1", program.read_err_until("serving"))
    assert found
    return found[1]


@pytest.mark.parametrize("number", ENDS)
def test_a_server_is_ended_in_order(start: Start, talkative: Path, number: signal.Signals) -> None:
    program = start("serve", talkative, "--port", 0, "--nodes", 2)
    url = served_at(program)
    asked = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=DEADLINE_S) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        ended: list[str] = []
        thread = threading.Thread(target=lambda: ended.append(ends_with(program, number, 0)))
        thread.start()
        rest: list[str] = []
        with suppress(httpx.RemoteProtocolError) if number not in POLITE else nullcontext():
            rest.extend(line for line in lines if line)
        thread.join()
    assert ended
    assert "stopped" in ended[0]
    if number in POLITE:
        assert "the server is stopping" in rest[-2]
        assert rest[-1] == "data: [DONE]"


def test_a_client_that_sends_slowly_does_not_keep_the_server(start: Start, tiny: Path) -> None:
    program = start("serve", tiny, "--port", 0)
    host, port = served_at(program).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        assert httpx.get(f"http://{host}:{port}/health").status_code == 200
        ends_with(program, signal.SIGTERM, 0)


def test_a_server_is_ended_while_it_loads_and_while_it_waits(start: Start, tiny: Path) -> None:
    program = start("serve", tiny, "--port", 0, "--nodes", 3)
    program.read_err_until("loading")
    ends_with(program, signal.SIGINT, 0)
    program = start("serve", tiny, "--port", 0, "--listen", "tcp://127.0.0.1:0", "--wait", 2)
    program.read_err_until("loading")
    ends_with(program, signal.SIGINT, 0)


def test_a_server_tells_where_others_join_and_a_worker_joins(
    start: Start, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("PRIMA_TOKEN", format_token(new_secret()))
    server = start("serve", tiny, "--port", 0, "--listen", "tcp://127.0.0.1:0", "--wait", 2, "--name", "desk")
    told = server.read_err_until("and the token in PRIMA_TOKEN")
    found = re.search(r"prima join (\S+)", told)
    assert found
    worker = start("join", found[1], "--model", tiny, "--name", "attic")
    url = served_at(server)
    health = httpx.get(f"{url}/health").json()
    assert (health["status"], health["nodes"]) == ("ok", ["desk", "attic"])
    ends_with(worker, signal.SIGINT, 0)
    ends_with(server, signal.SIGINT, 0)


def test_ipv6_loopback_is_served(start: Start, tiny: Path) -> None:
    program = start("serve", tiny, "--port", 0, "--host", "::1")
    url = served_at(program)
    assert url.startswith("http://[::1]:")
    assert httpx.get(f"{url}/v1/models").status_code == 200


# ---------------------------------------------------------------- where pynng cannot be imported


@pytest.fixture
def without_pynng(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this program's processes and in those that they start."""
    folder = tmp_path / "no-pynng"
    folder.mkdir()
    (folder / "pynng.py").write_text("raise ImportError('no wheel for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PRIMA_TOKEN", format_token(new_secret()))


@pytest.mark.usefixtures("without_pynng")
@pytest.mark.parametrize("how", [(), ("--transport", "tcp")], ids=["by default", "tcp"])
def test_local_nodes_serve_without_pynng(start: Start, tiny: Path, how: tuple[str, ...]) -> None:
    program = start("serve", tiny, "--port", 0, "--nodes", 2, *how)
    url = served_at(program)
    assert len(httpx.get(f"{url}/health").json()["nodes"]) == 2
    body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4
    ends_with(program, signal.SIGINT, 0)


@pytest.mark.usefixtures("without_pynng")
def test_machines_join_without_pynng_where_tcp_is_written_out(start: Start, tiny: Path) -> None:
    server = start("serve", tiny, "--port", 0, "--listen", "tcp://127.0.0.1:0", "--wait", 2)
    found = re.search(r"prima join (\S+)", server.read_err_until("and the token in PRIMA_TOKEN"))
    assert found
    worker = start("join", found[1], "--model", tiny, "--name", "attic")
    assert "attic" in httpx.get(f"{served_at(server)}/health").json()["nodes"]
    ends_with(worker, signal.SIGINT, 0)
    ends_with(server, signal.SIGINT, 0)


@pytest.mark.usefixtures("without_pynng")
@pytest.mark.parametrize(
    ("arguments", "says", "instead"),
    [
        (("serve", "--listen", "127.0.0.1:0"), "tls+tcp:// needs pynng", "write tcp://HOST:PORT on every machine"),
        (("join", "127.0.0.1:1"), "tls+tcp:// needs pynng", "write tcp://HOST:PORT on every machine"),
        (("run", "-p", "x", "--nodes", "2", "--transport", "ipc"), "ipc:// needs pynng", "use --transport unix"),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_what_needs_pynng_says_so_and_what_to_use(
    start: Start, arguments: tuple[str, ...], says: str, instead: str
) -> None:
    ended = start(*arguments).end()
    assert ended.code == 1
    assert f"{says}, which cannot be used here: no wheel for this machine" in ended.err
    assert instead in ended.err
    assert "Traceback" not in ended.err
