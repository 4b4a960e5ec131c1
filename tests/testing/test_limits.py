"""Plugins that hang, leave the program or print: the kits end, say so, and their output stays readable."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import Backend, Shard, Transport, TransportPlugin
from prima_core.plan.plan import Plan
from prima_core.plan.problem import Problem
from prima_core.testing.checks import CheckFailed, Tolerance, check_backend, check_solver, check_transport
from prima_core.testing.limits import watched, within
from prima_core.testing.report import Recorder, Wrong
from prima_even.solver import solve as even
from tests.testing import faults
from tests.testing.faults import plugin


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What hangs waits for it; it comes when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_what_hangs_is_told_with_its_line(never: threading.Event) -> None:
    with pytest.raises(Wrong) as caught:
        within(0.2, never.wait, "be quick")
    assert "threading.py" in caught.value.came
    assert (caught.value.expected, caught.value.hint) == ("an end within 0.2 s", "be quick")


def test_what_ends_gives_its_result_or_raises() -> None:
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(SystemExit):
        within(5.0, lambda: sys.exit(3))


def test_only_a_check_that_hangs_ends_the_suite(never: threading.Event) -> None:
    recorder = Recorder()

    def hang() -> None:
        never.wait()

    def suite() -> bool:
        for _ in range(5):
            recorder.run("quick", lambda: time.sleep(0.2))
        return recorder.run("slow", hang)

    assert watched(recorder, suite, 0.8) is None
    assert [(check.name, check.expected) for check in recorder.checks[4:]] == [
        ("quick", ""),
        ("slow", "an end within 0.8 s"),
    ]


def test_a_backend_that_hangs_is_left_behind(never: threading.Event) -> None:
    class Hangs(faults.Faulty):
        def load(self, *arguments: object) -> Shard:
            never.wait()
            raise PluginError("too late")

    with pytest.raises(CheckFailed, match="it hangs: ") as caught:
        check_backend(plugin(Hangs), types=(), families=(), kv_types=(), limit_s=0.5)
    assert caught.value.failures[-1].expected == "an end within 0.5 s"


def test_a_solver_that_hangs_is_told_with_its_problem(never: threading.Event) -> None:
    def solve(problem: Problem) -> Plan:
        if len(problem.nodes) > 3:
            never.wait()
        return even(problem)

    with pytest.raises(CheckFailed, match=r"it hangs: .*\n.*random_problem\(7, ") as caught:
        check_solver(solve, limit_s=0.3)
    assert [check.name for check in caught.value.failures] == ["errors"]


# ---------------------------------------------------------------- leaving the program


def leave(*_: object) -> Backend:
    sys.exit(0)


def leave_instead_of_a_plan(problem: Problem) -> Plan:
    sys.exit(0)


def test_a_plugin_that_leaves_the_program_fails() -> None:
    def open_transport() -> Transport:
        sys.exit(0)

    with pytest.raises(CheckFailed, match="SystemExit: 0"):
        check_backend(leave)
    with pytest.raises(CheckFailed, match="SystemExit"):
        check_solver(leave_instead_of_a_plan, n_problems=3)
    with pytest.raises(CheckFailed, match=r"x: 1 of 1 checks failed\nlistening\n.*\n.*SystemExit: 0"):
        check_transport(TransportPlugin("x", 1, open_transport))


# ---------------------------------------------------------------- printing

PRINTS = """
import os
from prima_core.hookspecs import hookimpl
from prima_core.interfaces import SolverPlugin

@hookimpl
def prima_solvers():
    print("imported")
    yield SolverPlugin(name="chatty", api=1, solve=solve, summary="talks")

def solve(problem):
    from prima_even.solver import solve
    print("solving")
    os.write(1, b"native\\n")
    return solve(problem)
"""


def test_what_a_plugin_prints_is_not_in_the_report(tmp_path: Path) -> None:
    """From any folder, with nothing of the repository but what is installed."""
    Path(tmp_path, "chatty.py").write_text(PRINTS)
    metadata = Path(tmp_path, "chatty-1.0.dist-info")
    metadata.mkdir()
    Path(metadata, "METADATA").write_text("Metadata-Version: 2.1\nName: chatty\nVersion: 1.0\n")
    Path(metadata, "entry_points.txt").write_text("[prima]\nchatty = chatty\n")
    command = [sys.executable, "-m", "prima_core.testing.checks", "solver", "chatty", "--json"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert checks["same answer in a fresh process"] == "ok"
    assert {"imported", "solving", "native"} <= set(done.stderr.split())


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: check_backend("numpy"), "'numpy' is no backend"),  # type: ignore[arg-type]
        (lambda: check_backend(leave, types=("Q4_X",)), "types has 'Q4_X' (there are: F32, F16"),  # type: ignore[arg-type]
        (lambda: check_backend(leave, families=("llma",)), "families has 'llma'"),  # type: ignore[arg-type]
        (lambda: check_backend(leave, kv_types=("f12",)), "kv_types has 'f12'"),  # type: ignore[arg-type]
        (lambda: check_backend(leave, types="Q4_K"), "types is 'Q4_K' (give a list)"),  # type: ignore[arg-type]
        (lambda: check_backend(leave, batches=(1, 0)), "batches has 0 (there are: 1 to 128)"),
        (lambda: Tolerance(logits=math.nan), "the tolerance logits is nan"),
        (lambda: Tolerance(batch=-1.0), "the tolerance batch is -1.0"),
        (lambda: check_solver(7), "7 is no solver"),  # type: ignore[arg-type]
        (lambda: check_solver(even, n_problems=0), "n_problems is 0"),
        (lambda: check_transport(7), "7 is no transport"),  # type: ignore[arg-type]
        (lambda: check_transport("tcp", address="unix://x"), "'unix://x' is no address of tcp"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        call()


def test_a_place_where_nothing_can_listen_is_told_once() -> None:
    with pytest.raises(
        CheckFailed, match=r"1 of 1 checks failed\nlistening\n.*listens at tcp://\n(.*\n)*.*free place, e.g. tcp://"
    ):
        check_transport("tcp")
