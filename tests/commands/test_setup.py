from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from prima_core.commands.serve import model_places
from prima_core.commands.setup import (
    DEFAULT_SAMPLING,
    check_transport,
    head_options,
    head_secret,
    node_options,
    sampling,
    worker_secret,
)
from prima_core.config import LOCAL_TRANSPORT, TABLE
from prima_core.engine.engine import MAX_WAITING
from prima_core.engine.request import Sampling
from prima_core.errors import ConfigError, PluginError
from prima_core.model.gguf import GGUFFile
from prima_core.plugins import Registry
from prima_core.ring.security import format_token, new_secret


def settings(**changed: Any) -> dict[str, Any]:  # Any: the values of config.TABLE
    assert changed.keys() <= {setting.name for setting in TABLE}
    return {**{setting.name: setting.default for setting in TABLE}, **changed}


# ---------------------------------------------------------------- sampling


RECOMMENDED = {
    "general.sampling.temp": 0.25,
    "general.sampling.top_k": 20,
    "general.sampling.top_p": 0.5,
    "general.sampling.min_p": 0.1,
    "general.sampling.penalty_repeat": 1.1,
}
FROM_FILE = Sampling(temperature=0.25, top_k=20, top_p=0.5, min_p=0.1, repetition_penalty=1.1)


def test_the_user_is_asked_first_then_the_model_then_the_default() -> None:
    assert sampling({}, {}) == DEFAULT_SAMPLING
    assert sampling(settings(), RECOMMENDED) == FROM_FILE
    told = settings(temp=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
    assert sampling(told, RECOMMENDED) == Sampling(temperature=0, top_k=0, top_p=1)
    assert sampling(settings(top_k=3), RECOMMENDED) == replace(FROM_FILE, top_k=3)
    told = settings(frequency_penalty=0.5, presence_penalty=-1.0)
    assert sampling(told, RECOMMENDED) == replace(FROM_FILE, frequency_penalty=0.5, presence_penalty=-1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**12, "0.7", None, [0.5]])
@pytest.mark.parametrize("name", ["temp", "top_k", "top_p", "min_p", "penalty_repeat"])
def test_a_recommendation_that_is_none_is_told_and_left_out(
    name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert sampling({}, {f"general.sampling.{name}": value}) == DEFAULT_SAMPLING
    assert f"recommends a {name} of" in caplog.text


def test_the_recommendation_of_a_model_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recommending.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("general.sampling.temp", 0.25)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert sampling(settings(), file.metadata) == replace(DEFAULT_SAMPLING, temperature=0.25, top_k=20)


# ---------------------------------------------------------------- where nodes join


def listen_of(**changed: Any) -> str | None:
    return head_options(settings(**changed), {}).listen


def test_a_single_node_listens_nowhere() -> None:
    assert listen_of() is None


@pytest.mark.parametrize(
    ("transport", "address"),
    [
        ("unix", "unix://"),
        ("ipc", "ipc://"),
        ("inproc", "inproc://"),
        ("tcp", "tcp://127.0.0.1:0"),
        ("tls+tcp", "tls+tcp://127.0.0.1:0"),
    ],
)
def test_local_nodes_join_where_only_local_ones_can(transport: str, address: str) -> None:
    assert listen_of(nodes=2, transport=transport) == address


def test_what_the_user_says_is_where_nodes_join() -> None:
    assert listen_of(listen="0.0.0.0:7000", wait=3) == "tls+tcp://0.0.0.0:7000"
    assert listen_of(listen="tcp://10.0.0.1:7000", nodes=2, transport="ipc") == "tcp://10.0.0.1:7000"


def test_waiting_for_nodes_that_cannot_join_is_refused() -> None:
    with pytest.raises(ConfigError, match="--wait 3") as error:
        listen_of(wait=3, nodes=2)
    assert "--listen" in error.value.hint
    assert listen_of(wait=2, nodes=2) == f"{LOCAL_TRANSPORT}://"


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry.load(os.environ)
    yield registry
    registry.close()


def test_a_transport_that_was_asked_for_must_be_there_also_for_a_single_node(registry: Registry) -> None:
    check_transport(settings(), registry)
    check_transport(settings(transport="inproc"), registry)
    with pytest.raises(PluginError, match="pigeon"):
        check_transport(settings(transport="pigeon"), registry)


# ---------------------------------------------------------------- nodes and secrets


def test_each_local_node_may_use_all_cores_unless_the_user_says_how_many() -> None:
    assert [node_options(settings(), n).threads for n in (1, 2, 16)] == [0, 0, 0]
    assert node_options(settings(threads=5), 2).threads == 5


def test_memory_is_read_as_people_write_it() -> None:
    assert node_options(settings(memory="1.5GB")).memory == 1_500_000_000
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        node_options(settings(memory="lots"))


def test_where_no_other_machine_can_join_the_secret_lives_as_long_as_the_process() -> None:
    assert head_secret(settings()) != head_secret(settings())


def test_a_given_token_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_environment, in_file = new_secret(), new_secret()
    file = tmp_path / "token"
    file.write_text(format_token(in_file))
    file.chmod(0o600)
    monkeypatch.setenv("PRIMA_TOKEN", format_token(in_environment))
    assert head_secret(settings()) == worker_secret(settings()) == in_environment
    assert head_secret(settings(token_file=str(file))) == worker_secret(settings(token_file=str(file))) == in_file


def test_a_head_that_others_join_keeps_its_token_for_the_next_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("prima_core.commands.setup.token_path", lambda: tmp_path / "state" / "token")
    with pytest.raises(ConfigError, match="no cluster token"):
        worker_secret(settings())
    made = head_secret(settings(listen="0.0.0.0:7747"))
    assert head_secret(settings(listen="0.0.0.0:7747")) == worker_secret(settings()) == made


def test_the_head_is_asked_for_what_the_user_said() -> None:
    options = head_options(
        settings(
            name="desk",
            nodes=3,
            context=100,
            parallel=2,
            chunk=16,
            solver="greedy",
            memory="1GB",
            chat_template="rag",
            rounds=2,
        ),
        {},
    )
    assert (options.name, options.n_local, options.context, options.parallel) == ("desk", 2, 100, 2)
    assert (options.chat_template, options.rounds) == ("rag", 2)
    assert head_options(settings(), {}).rounds == 0
    assert (options.chunk, options.solver, options.node.memory) == (16, "greedy", 10**9)


def test_a_plan_that_cannot_be_read_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the plan"):
        head_options(settings(plan=str(tmp_path / "none.json")), {})


# ---------------------------------------------------------------- where a worker looks for models


def test_a_worker_looks_into_the_models_folder_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "prima" / "models"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    *places, builtin = model_places(settings())
    assert (places, builtin.name) == ([], "prima-builtin.gguf")
    folder.mkdir(parents=True)
    assert model_places(settings())[0] == folder
    assert model_places(settings(models=str(tmp_path)))[:-1] == (tmp_path,)


# ---------------------------------------------------------------- requests


def test_what_may_wait_and_whether_the_context_shifts_come_from_the_settings() -> None:
    options = head_options(settings(queue=7, context_shift=True), {})
    assert (options.queue, options.context_shift) == (7, True)
    usual = head_options(settings(), {})
    assert (usual.queue, usual.context_shift) == (MAX_WAITING, False)
