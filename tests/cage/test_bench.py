"""`prima bench --cluster` as a user types it, with prima and with other programs in the cage; and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from prima_core.cage import cage, life
from prima_core.cage.life import Run
from prima_core.testing.cluster import until
from tests.cage.conftest import is_alive, run_with_node, traces, until_gone
from tests.commands.conftest import Prima, prima  # noqa: F401  a fixture

PRIMA = (sys.executable, "-m", "prima_core")
TWO_NODES = """
name = "two"
[defaults]
memory = "200MB"
base = "200MB"
[[nodes]]
name = "a"
link = "1Gbit/s"
delay_ms = 0.2
[[nodes]]
name = "b"
"""
FOREIGN = """
name = "foreign"
measure = {begin = "^measures", tokens_per_s = "^speed ([0-9.]+)"}
[[nodes]]
name = "head"
memory = "96MB"
copy = true
command = ["sh", "-c", "echo measures {gen} of {model}; dd if={model} of=/dev/null 2>&1; echo speed 12.5; sleep 1000"]
[[nodes]]
name = "other"
memory = "96MB"
ready = "^ready"
command = ["sh", "-c", "echo ready at {address}, head is {head}; sleep 1000"]
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """A bench with processes that wait for ever."""

    process: subprocess.Popen[bytes]
    run: str

    def kill_watcher(self) -> None:
        """It is gone then: its lock is free."""
        (watcher,) = (one for one in psutil.Process(self.process.pid).children() if life.__name__ in one.cmdline())
        watcher.kill()
        until("end of the watcher", lambda: not is_alive(watcher.pid))

    def kept(self) -> list[int]:
        """All its processes but itself."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


@contextmanager
def waiting_bench(tmp_path: Path, model: Path) -> Iterator[Bench]:
    name = f"waits-{os.urandom(4).hex()}"
    file = tmp_path / "waits.toml"
    file.write_text(
        'name = "waits"\nmeasure = {tokens_per_s = "(never)"}\n[[nodes]]\nmemory = "96MB"\ncopy = true\ndelay_ms = 1\n'
        f'name = "{name}"\ncommand = ["sh", "-c", "sleep 1000 & sleep 1000; wait"]\n'
    )
    process = subprocess.Popen([*PRIMA, "bench", "--cluster", str(file), str(model)], start_new_session=True)
    try:
        until("the namespace", lambda: run_with_node(name) is not None)
        run = run_with_node(name) or ""
        bench = Bench(process, run)
        # the watcher, the relay, the shell, and its two children
        until("all processes", lambda: len(bench.kept()) >= 5)
        yield bench
    finally:
        process.kill()
        process.wait()


def bench(file: Path, model: Path, *more: str) -> dict[str, Any]:  # Any: JSON
    done = subprocess.run(
        [*PRIMA, "bench", "--cluster", str(file), str(model), "--json", *more],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=dict[str, Any])


# ---------------------------------------------------------------- what it measures


@pytest.mark.usefixtures("host")
def test_two_nodes_of_prima_are_measured_in_their_cages(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(TWO_NODES)
    told = bench(file, model, "--prompt", "16", "--gen", "12", "--transport", "tcp")
    assert (told["cluster"], told["n_prompt"], told["model_bytes"]) == ("two", 16, model.stat().st_size)
    assert 6 <= told["n_tokens"] <= 10  # the first are left out
    assert 0 < told["tpot_s"] < 10
    assert 0 < told["ttft_s"] < 20
    assert [node["name"] for node in told["nodes"]] == ["a", "b"]
    for node in told["nodes"]:
        assert node["limit_bytes"] == 400_000_000
        assert node["budget_bytes"] == 200_000_000
        assert 0 < node["peak_bytes"] <= 400_000_000
        assert node["rss_bytes"] > 10_000_000
        assert 0 < node["pressure"] < 1
        assert 0 < node["planned_bytes"] < 200_000_000
        assert node["pressure_beyond_plan"] < node["pressure"]
        assert node["told_per_token"]["compute_s"] > 0  # so both computed
        assert node["told_per_token"]["sent_bytes"] > 0


@pytest.mark.usefixtures("host")
def test_another_program_is_measured_by_what_it_prints_on_a_copy_of_the_file(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "foreign.toml"
    file.write_text(FOREIGN)
    told = bench(file, model, "--gen", "4")
    assert told["tpot_s"] == pytest.approx(0.08)
    assert told["ttft_s"] is None
    assert told["n_tokens"] == 4
    head, other = told["nodes"]
    assert 0 < 4 * head["read_bytes_per_token"] <= 2 * told["model_bytes"]  # from the disk: the copy was cold
    assert other["told_per_token"] == {}
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.usefixtures("host")
def test_a_node_that_ends_is_told_with_its_last_lines(prima: Prima, tmp_path: Path, model: Path) -> None:  # noqa: F811
    file = tmp_path / "dies.toml"
    file.write_text(
        'name = "dies"\nmeasure = {tokens_per_s = "(never)"}\n[[nodes]]\nname = "a"\nmemory = "96MB"\n'
        'command = ["sh", "-c", "echo no such thing; exit 3"]\n'
    )
    ended = prima("bench", "--cluster", file, model)
    assert ended.code == 1
    assert "node a has ended with exit code 3" in ended.err
    assert "no such thing" in ended.err


@pytest.mark.usefixtures("host")
def test_another_node_that_ends_while_the_head_works_is_told(prima: Prima, tmp_path: Path, model: Path) -> None:  # noqa: F811
    file = tmp_path / "dies.toml"
    file.write_text(FOREIGN.replace("^speed ([0-9.]+)", "(never)").replace("{head}; sleep 1000", "{head}; exit 4"))
    ended = prima("bench", "--cluster", file, model)
    assert ended.code == 1
    assert "node other has ended with exit code 4" in ended.err


@pytest.mark.usefixtures("host")
def test_a_model_that_does_not_fit_is_told_and_not_waited_for(prima: Prima, tmp_path: Path, model: Path) -> None:  # noqa: F811
    file = tmp_path / "small.toml"
    file.write_text('name = "small"\n[[nodes]]\nname = "a"\nmemory = "1kB"\nbase = "200MB"\n[[nodes]]\nname = "b"\n'
                    'memory = "1kB"\nbase = "200MB"\n')  # fmt: skip
    ended = prima("bench", "--cluster", file, model)
    assert ended.code == 1
    assert "small does not serve: " in ended.err
    assert "does not fit" in ended.err


# ---------------------------------------------------------------- how it ends


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_nothing(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    with waiting_bench(tmp_path, model) as bench:
        processes = bench.kept()
        bench.process.send_signal(number)
        assert bench.process.wait(30) == 130
        assert traces(bench.run) == []
        assert not any(map(is_alive, processes))
        assert list(model.parent.iterdir()) == [model]


@pytest.mark.usefixtures("host")
def test_a_killed_bench_leaves_nothing(tmp_path: Path, model: Path) -> None:
    with waiting_bench(tmp_path, model) as bench:
        processes = bench.kept()
        bench.process.kill()
        bench.process.wait()
        until_gone(bench.run, processes)
        assert list(model.parent.iterdir()) == [model]


@pytest.mark.usefixtures("host")
def test_what_is_left_when_the_watcher_is_killed_too_goes_with_the_next_run(tmp_path: Path, model: Path) -> None:
    with waiting_bench(tmp_path, model) as bench:
        processes = bench.kept()
        bench.kill_watcher()
        bench.process.kill()
        bench.process.wait()
        assert len(traces(bench.run)) >= 4  # its folder, two namespaces, groups
        Run.begin().end()
        assert traces(bench.run) == []
        until("end of all processes", lambda: not any(map(is_alive, processes)))
        assert list(model.parent.iterdir()) == [model]


@pytest.mark.usefixtures("host")
def test_a_run_that_lost_its_watcher_takes_everything_away_itself(tmp_path: Path, model: Path) -> None:
    with waiting_bench(tmp_path, model) as bench:
        bench.kill_watcher()
        bench.process.send_signal(signal.SIGINT)
        assert bench.process.wait(30) == 130
        assert traces(bench.run) == []


@pytest.mark.usefixtures("host")
def test_runs_beside_each_other_leave_each_other_alone(tmp_path: Path, model: Path) -> None:
    with waiting_bench(tmp_path, model) as bench:
        before = traces(bench.run)
        Run.begin().end()
        assert traces(bench.run) == before


# ---------------------------------------------------------------- what it asks for


def test_who_is_not_root_is_told_so(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(cage, "TOOLS", {})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    ended = prima("bench", "--cluster", "four-equal")
    assert ended.code == 1
    assert "needs root" in ended.err
    assert "sudo" in ended.err


def test_missing_programs_are_told_with_their_packages(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    ended = prima("bench", "--cluster", "four-equal")
    assert ended.code == 1
    assert "needs the programs ip, tc, nsenter" in ended.err
    assert "apt install iproute2 util-linux" in ended.err


def test_other_systems_are_told_that_it_is_for_linux(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "platform", "darwin")
    ended = prima("bench", "--cluster", "four-equal")
    assert ended.code == 1
    assert "on Linux only" in ended.err


@pytest.mark.parametrize("flag", [("--memory", "1GB"), ("--nodes", "2"), ("--parallel", "2")])
def test_what_the_file_says_is_no_flag(prima: Prima, flag: tuple[str, str]) -> None:  # noqa: F811
    ended = prima("bench", "--cluster", "four-equal", *flag)
    assert ended.code in (1, 2)
    assert flag[0] in ended.err
