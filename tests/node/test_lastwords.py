"""Weights that cannot be read any more end a process, which says why: with real processes and real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prima_core.arch.families import open_model
from prima_core.node.driver import State
from prima_core.node.lastwords import WEIGHTS_LOST, meaning_of
from prima_core.ring.security import format_token
from prima_core.ring.wire import WirePolicy
from prima_core.testing.cluster import DEADLINE_S, SECRET, plan_of, until
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.node.cluster import Cluster, free_port, left_behind

if sys.platform == "win32":
    pytest.skip("Windows cuts no file that is mapped, and has no SIGBUS", allow_module_level=True)

Start = Callable[..., Cluster]
N_LAYERS = 4
PROMPT = tuple(range(5, 12))
LONG = 3000
SHAPE = TinyModel(n_layers=N_LAYERS, d_model=128, d_ff=512, types="Q8_0", context_length=4096, seed=11)
"""Each matrix is several pages."""

PRIMA = """
import sys
from prima_core import cli
from prima_core.node import join, watch
join.CHECK_FILES_EVERY_S = watch.CHECK_FILES_EVERY_S = 1000.0  # who looks at the files now and then sees nothing yet
cli.main()
"""


def cut(path: Path) -> None:
    """What stays is the header."""
    os.truncate(path, 4096)


def written(path: Path) -> Path:
    return write_tiny_model(path, SHAPE)


@contextmanager
def process(*command: str, folder: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A program of prima's and what it says on standard error."""
    running = subprocess.Popen(
        [sys.executable, "-c", PRIMA, *command],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PRIMA_TOKEN": format_token(SECRET), "TMPDIR": str(folder or "")},
    )
    pipe, said = running.stderr, list[str]()
    assert pipe is not None
    reader = threading.Thread(target=lambda: said.extend(pipe))
    reader.start()
    try:
        yield running, said
    finally:
        running.kill()
        running.wait()
        reader.join(DEADLINE_S)
        pipe.close()
        assert running.stdin is not None
        running.stdin.close()


@pytest.mark.parametrize("kernels", ["native", "exact"])
@pytest.mark.parametrize("transport", ["tcp", "tls+tcp"])
def test_a_worker_whose_file_is_cut_says_why_and_the_head_lives(
    cluster: Start, tmp_path: Path, kernels: str, transport: str
) -> None:
    """The compiled kernels read in threads that know no Python; numpy reads in the one that holds it all up."""
    copy = written(tmp_path / "copy.gguf")
    with open_model(written(tmp_path / "heads.gguf")) as model:
        plan = plan_of(("head", 0, 2), ("w", 2, N_LAYERS))
        head = cluster(model, listen=f"{transport}://127.0.0.1:{free_port()}", plan=plan, wire=WirePolicy.F32)
        options = ("--name", "w", "--model", str(copy), "--backend", "numpy", "--threads", "1", "--kernels", kernels)
        with process("join", head.address, *options) as (worker, said):
            head.until_serving_with("head", "w")
            running = head.ask(PROMPT, LONG)
            running.take()
            cut(copy)
            cause = f"{copy} was changed or replaced while it was in use"
            error = str(running.error())
            assert "node 'w' was lost: it left" in error
            assert cause in error
            assert worker.wait(DEADLINE_S) == WEIGHTS_LOST
            until("the end of service", lambda: head.status.state is State.WAITING)
            assert cause in head.status.reason
        assert any("this process ends" in line and cause in line for line in said), said
        head.head.close()


@pytest.mark.parametrize("n_nodes", ["1", "2"])
def test_a_head_whose_file_is_cut_tells_its_clients_why_and_leaves_no_sockets(tmp_path: Path, n_nodes: str) -> None:
    """The head computes all layers: were another node the first to miss weights, only that one would end."""
    copy, folder = written(tmp_path / "copy.gguf"), tmp_path / "temporary"
    folder.mkdir()
    plan = tmp_path / "plan.json"
    plan.write_bytes(subprocess.check_output([sys.executable, "-c", PRIMA, "plan", str(copy), "--json", "-c", "4096"]))
    options = ("--port", "0", "--threads", "1", "-c", "4096", "--nodes", n_nodes, "--plan", str(plan))
    with process("serve", str(copy), *options, folder=folder) as (server, said):
        until("serving", lambda: any("serving " in line for line in said) or server.poll() is not None)
        url = next(found[0] for line in said if (found := re.search(r"http://\S+/v1", line)))
        body = {"prompt": "a", "max_tokens": LONG, "stream": True, "ignore_eos": True}
        wanted = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(wanted, timeout=DEADLINE_S) as answer:
            assert answer.readline().startswith(b"data:")
            cut(copy)
            rest = answer.read().decode()
        assert "was changed or replaced while it was in use" in rest
        assert server.wait(DEADLINE_S) == WEIGHTS_LOST
    assert any("this process ends" in line for line in said), said
    assert left_behind(folder) == []


# ---------------------------------------------------------------- the handler alone

ALONE = """
import mmap, os, signal, sys, threading
import numpy as np
from prima_core.arch.families import open_model
from prima_core.node.lastwords import LastWords

def hang(error):
    threading.Event().wait()

def raise_(error):
    raise RuntimeError("no words")

def say(error):
    print(error, flush=True)

model = open_model(sys.argv[1])
words = LastWords({"hang": hang, "raise": raise_}.get(sys.argv[2], say), lambda: print("left", flush=True))
words.start()
words.watch(model)
os.truncate(sys.argv[1], 4096)
view = model.file.view("output.weight").data
def read():
    view.tobytes()  # by memcpy, with the GIL held
"""


def alone(path: Path, program: str, tell: str = "say") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", ALONE + program, path, tell], capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("program", ["read()", "threading.Thread(target=read).start()"], ids=["main", "other"])
def test_a_thread_that_holds_the_gil_does_not_keep_the_words_in(file: Path, program: str) -> None:
    code, said = alone(file, program)
    assert code == WEIGHTS_LOST
    assert f"{file} was changed or replaced" in said
    assert said.endswith("left\n")


@pytest.mark.parametrize("tell", ["hang", "raise"])
def test_the_process_ends_though_nobody_can_be_told(file: Path, tell: str) -> None:
    assert alone(file, "read()", tell)[0] == WEIGHTS_LOST


FOREIGN = """
with open(sys.argv[1], "rb+") as other:
    os.truncate(sys.argv[1], 1 << 16)
    data = np.frombuffer(mmap.mmap(other.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
os.truncate(sys.argv[1], 4096)
data.tobytes()
"""


@pytest.mark.parametrize(
    "program",
    [FOREIGN, "os.kill(os.getpid(), signal.SIGBUS)", "words.close(); read()"],
    ids=["of another map", "that was sent", "after the end"],
)
def test_a_bus_error_that_is_not_ours_ends_the_process_as_ever(file: Path, program: str) -> None:
    assert alone(file, program) == (-signal.SIGBUS, "")


def test_without_the_native_module_the_signal_ends_the_process(file: Path) -> None:
    without = "import sys\nsys.modules['prima_core._lastwords'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", without + ALONE + "read()", file, "say"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGBUS


def test_exit_codes_have_a_meaning_where_it_is_ours() -> None:
    assert "could not read its weights any more" in meaning_of(WEIGHTS_LOST)
    assert meaning_of(1) == meaning_of(-signal.SIGBUS) == ""
