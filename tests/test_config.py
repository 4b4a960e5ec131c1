"""Every setting: one line in one table, a flag, an environment twin, and a place in the help."""

from __future__ import annotations

from typing import Any

import pytest
import rich_click as click
from click.testing import CliRunner

from prima_core.cli import cli
from prima_core.config import LOCAL_TRANSPORT, SETTINGS, TABLE, Setting, options
from prima_core.interfaces import KvType

COMMANDS = sorted(cli.commands)
ISSUE = {
    "serve": [
        "--backend", "--nodes", "--wait", "--plan", "--solver", "--transport", "--listen", "--advertise", "-c", "-t",
        "--host", "--port", "--api-key", "--wire", "--token-file", "--kv-type", "--context-shift", "--queue",
        "--rounds",
    ],
    "join": ["--model", "--models", "--listen", "--advertise", "--token-file"],
    "run": ["-p", "-n", "--temp", "--nodes", "--raw", "--json", "--kv-type", "--rounds"],
    "chat": ["-n", "--temp", "--nodes", "--kv-type"],
    "plan": ["--json", "--problem", "--solver", "--plan", "--kv-type", "--rounds"],
    "tokenize": ["--json", "--special"],
    "bench": ["--prompt", "--gen", "-t", "--nodes", "--json", "--kv-type", "--rounds"],
    "profile": ["--json", "--backend", "-t"],
    "plugins": ["--json"],
    "ps": ["--json", "--watch", "--host", "--port", "--api-key"],
    "doctor": ["--json"],
    "pull": ["--models"],
    "ls": ["--json", "--models"],
    "rm": ["-y", "--models"],
}  # fmt: skip
"""What people and scripts call each command with."""


def flags_of(command: str) -> set[str]:
    return {flag for param in cli.commands[command].params for flag in param.opts if flag.startswith("-")}


def settings_of(command: str) -> list[Setting]:
    return [SETTINGS[param.name] for param in cli.commands[command].params if param.name in SETTINGS]


def parsed(command: str, *arguments: str) -> dict[str, Any]:  # Any: of each setting's own type
    return cli.commands[command].make_context(command, list(arguments)).params


def test_the_commands_are_those_that_are_documented() -> None:
    assert set(COMMANDS) == set(ISSUE)


@pytest.mark.parametrize("command", ISSUE)
def test_a_command_has_its_flags(command: str) -> None:
    assert set(ISSUE[command]) <= flags_of(command)


def test_no_two_settings_share_a_flag_or_a_name() -> None:
    flags = [flag for setting in TABLE for flag in setting.flags]
    assert len(set(flags)) == len(flags)
    assert len(SETTINGS) == len(TABLE)


def test_every_setting_is_used() -> None:
    assert {setting.name for command in COMMANDS for setting in settings_of(command)} == set(SETTINGS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_names_each_setting_and_its_environment_twin(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"}, obj=None)
    assert shown.exit_code == 0
    for setting in settings_of(command):
        assert set(setting.flags) <= set(shown.output.replace(",", " ").split()), setting
        assert f"[env var: {setting.env}" in shown.output, setting


def test_the_help_of_a_command_with_many_flags_is_in_parts() -> None:
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "100"}).output
    titles = [line.split()[1] for line in shown.splitlines() if line.startswith("╭")]
    assert titles == ["Options", "HTTP", "Context", "Sampling", "Computing", "Ring"]


def test_the_help_tells_the_defaults() -> None:
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for default in ("127.0.0.1", "7746", "auto", "halda", LOCAL_TRANSPORT, "the model's, to 8192"):
        assert f"default: {default}" in shown


@pytest.mark.parametrize("setting", TABLE, ids=lambda setting: setting.name)
def test_the_environment_twin_is_read_and_the_flag_wins(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(command for command in COMMANDS if setting in settings_of(command))
    arguments = {"join": ["head"], "run": ["-p", "x"]}.get(command, [])
    if setting.kind is click.BOOL:
        monkeypatch.setenv(setting.env, "true")
        assert parsed(command, *arguments)[setting.name] is True
        monkeypatch.setenv(setting.env, "0")
        assert parsed(command, *arguments)[setting.name] is False
        assert parsed(command, *arguments, setting.flags[-1])[setting.name] is True
        return
    if isinstance(setting.kind, click.Choice):
        first, second = setting.kind.choices[:2]
    else:
        first, second = ("1", "0.5") if isinstance(setting.kind, click.FloatRange) else ("2", "3")
    monkeypatch.setenv(setting.env, str(first))
    assert str(parsed(command, *arguments)[setting.name]).removesuffix(".0") == first
    assert str(parsed(command, *arguments, setting.flags[-1], str(second))[setting.name]) == second


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "abc"),
        ("PORT", "70000"),
        ("NODES", "0"),
        ("TEMP", "-1"),
        ("TOP_P", "2"),
        ("WIRE", "f64"),
        ("CHUNK", "1.5"),
    ],
)
def test_a_wrong_value_in_the_environment_is_a_usage_error_that_names_the_variable(name: str, value: str) -> None:
    shown = CliRunner().invoke(cli, ["serve"], env={f"PRIMA_{name}": value, "COLUMNS": "200"})
    assert shown.exit_code == 2
    assert f"env var: 'PRIMA_{name}'" in shown.output


def test_every_type_of_kv_can_be_chosen() -> None:
    assert sorted(SETTINGS["kv_type"].kind.choices) == sorted(KvType)


def test_options_keep_their_order() -> None:
    @click.command()
    @options("port", "host", "seed")
    def command(**settings: Any) -> None:
        """Nothing."""

    assert [param.name for param in command.params] == ["port", "host", "seed"]
