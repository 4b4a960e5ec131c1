"""What goes wrong is one line, a hint, and exit code 1; what is written wrongly is click's usage error."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prima_numpy.kernels import Kernels
from prima_numpy.variants import ALL_VARIANTS
from tests.commands.conftest import Prima

LACKING = next(name for name in ALL_VARIANTS if name not in Kernels.variants())


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> Path:
    """A folder of files that are not what they should be."""
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:2000])
    (tmp_path / "garbage").write_bytes(b"garbage")
    (tmp_path / "empty").touch()
    return tmp_path


def told(prima: Prima, *arguments: object) -> tuple[str, str]:
    """The message and the hint."""
    ended = prima(*arguments)
    assert (ended.code, ended.out) == (1, "")
    *before, message, hint = ended.err.splitlines()
    assert all(line.startswith(("loading", "backend")) for line in before)
    assert message.startswith("prima: ")
    assert hint.startswith("  hint: ")
    return message, hint


@pytest.mark.parametrize(
    "command", [("run", "-p", "x"), ("chat",), ("bench",), ("plan",), ("serve", "--port", "0"), ("tokenize",)]
)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.gguf", "there is no file"),
        ("", "is a folder"),
        ("cut.gguf", "entries"),
        ("garbage", "not a GGUF"),
        ("empty", ""),
    ],
)
def test_a_model_file_that_is_none(prima: Prima, files: Path, command: tuple[str, ...], name: str, why: str) -> None:
    message, _ = told(prima, *command, files / name)
    assert why in message


@pytest.mark.parametrize("command", [("run", "-p", "x"), ("bench",), ("chat",), ("serve", "--port", "0")])
@pytest.mark.parametrize(
    ("flag", "value", "message", "hint"),
    [
        ("--solver", "pigeon", "no solver 'pigeon'", "even"),
        ("--backend", "pigeon", "no backend 'pigeon'", "numpy"),
        ("--transport", "pigeon", "no transport 'pigeon'", "ipc"),
        ("--kernels", "pigeon", "'pigeon'", "auto, native, int8, exact"),
        ("--memory", "lots", "'lots' is not a size", "4GB"),
        ("--plan", "none.json", "cannot read the plan none.json", "--plan"),
    ],
)
def test_a_setting_that_names_nothing(
    prima: Prima, tiny: Path, command: tuple[str, ...], flag: str, value: str, message: str, hint: str
) -> None:
    shown = told(prima, *command, tiny, flag, value)
    assert message in shown[0]
    assert hint in shown[1]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "-p", "x", "--backend", "numpy"),
        ("run", "-p", "x"),
        ("run", "-p", "x", "--nodes", "2", "--transport", "inproc"),
        ("bench",),
        ("chat",),
        ("serve", "--port", "0"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("abacus", "there is no CPU variant 'abacus'"),
        (LACKING, f"CPU variant '{LACKING}' needs instructions that this CPU"),
    ],
)
def test_a_cpu_variant_that_cannot_run_here(
    prima: Prima,
    tiny: Path,
    command: tuple[str, ...],
    variant: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other backend computes instead."""
    monkeypatch.setenv("PRIMA_CPU", variant)
    shown = told(prima, *command, tiny)
    assert message in shown[0]
    assert f"leave PRIMA_CPU unset for the best, or set it to one of: auto, {Kernels.variants()[0]}" in shown[1]


def test_a_plan_that_is_none(prima: Prima, tiny: Path, files: Path) -> None:
    assert "not a plan" in told(prima, "run", tiny, "-p", "x", "--plan", files / "garbage")[0]
    assert "not a plan" in told(prima, "plan", tiny, "--plan", files / "empty")[0]


def test_a_plan_for_another_cluster(prima: Prima, tiny: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(prima("plan", tiny, "--json").out.replace('"n_layers": 6', '"n_layers": 7'))
    ended = prima("run", tiny, "-p", "x", "--plan", plan)
    assert ended.code == 1
    assert "the plan is for 7 layers, the model has 6" in ended.err


@pytest.mark.parametrize("command", [("run", "-p", "x"), ("serve", "--port", "0")])
def test_a_model_that_does_not_fit(prima: Prima, tiny: Path, command: tuple[str, ...]) -> None:
    ended = prima(*command, tiny, "--memory", "1MB")
    assert ended.code == 1
    assert "does not fit" in ended.err


def test_a_problem_that_is_none(prima: Prima, files: Path) -> None:
    assert "cannot read the problem" in told(prima, "plan", "--problem", files / "none")[0]
    assert "not a problem" in told(prima, "plan", "--problem", files / "garbage")[0]


def test_a_prompt_longer_than_the_context(prima: Prima, tiny: Path) -> None:
    message, hint = told(prima, "run", tiny, "-p", "x", "-c", 5)
    assert "the context has 5" in message
    assert "-c" in hint


def test_sampling_that_is_no_number(prima: Prima, tiny: Path) -> None:
    ended = prima("run", tiny, "-p", "x", "--temp", "nan")
    assert (ended.code, ended.err) == (1, "prima: temperature cannot be nan\n")


# ---------------------------------------------------------------- serve and join


def test_a_port_that_is_taken(prima: Prima, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message, hint = told(prima, "serve", tiny, "--port", port)
    assert f"cannot serve on 127.0.0.1:{port}: " in message
    assert "--port" in hint


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "192.0.2.1", "127.0.0.1:80"])
def test_a_host_that_is_not_here(prima: Prima, tiny: Path, host: str) -> None:
    assert "cannot serve on" in told(prima, "serve", tiny, "--host", host, "--api-key", "k")[0]


@pytest.mark.parametrize("more", [(), ("--api-key", "")])
def test_another_interface_without_a_key(prima: Prima, tiny: Path, more: tuple[str, ...]) -> None:
    assert "API key" in told(prima, "serve", tiny, "--host", "0.0.0.0", *more)[0]


def test_waiting_for_nobody(prima: Prima, tiny: Path) -> None:
    assert "--wait 2" in told(prima, "serve", tiny, "--port", 0, "--wait", 2)[0]


@pytest.mark.parametrize("address", ["pigeon://x", "tcp://a b:1", "192.0.2.1:99999"])
def test_a_place_to_join_that_is_none(prima: Prima, tiny: Path, address: str) -> None:
    told(prima, "serve", tiny, "--port", 0, "--listen", address)


def test_joining_without_a_token(prima: Prima, tiny: Path) -> None:
    message, hint = told(prima, "join", "127.0.0.1", "--model", tiny)
    assert "no cluster token" in message
    assert "PRIMA_TOKEN" in hint


def test_joining_with_a_bad_token(prima: Prima, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_TOKEN", "prima_oops")
    assert "token" in told(prima, "join", "127.0.0.1", "--model", tiny)[0]


@pytest.mark.parametrize("flag", ["--model", "--models"])
def test_joining_with_models_that_are_not_there(prima: Prima, tmp_path: Path, flag: str) -> None:
    assert "none does not exist" in told(prima, "join", "127.0.0.1", flag, tmp_path / "none")[0]


def test_joining_nowhere(prima: Prima, tiny: Path) -> None:
    told(prima, "join", "no.such.host.invalid", "--model", tiny)


# ---------------------------------------------------------------- plugins


def test_a_plugin_that_is_not_installed(prima: Prima, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMA_PLUGINS", "pigeon")
    assert "PRIMA_PLUGINS names 'pigeon'" in told(prima, "doctor")[0]


# ---------------------------------------------------------------- click's own


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",), ("run", "-p"), ("run", "--pigeon", "-p", "x"), ("pigeon",), ("tokenize",), ("join",),
        ("plan", "a", "b"), ("run", "-p", "x", "-n", "0"), ("bench", "--gen", "1"), ("serve", "--plan", "."),
        ("run", "-p", "x", "--wait", "2"), ("run", "-p", "x", "-t", "1025"), ("run", "-p", "x", "-t", "-1"),
    ],
)  # fmt: skip
def test_a_command_that_is_written_wrongly(prima: Prima, arguments: tuple[str, ...]) -> None:
    ended = prima(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Error" in ended.err
