"""A node's threads and link: opened and closed as one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from prima_core.errors import ConfigError, LinkTimeout, PluginError
from prima_core.interfaces import Credentials
from prima_core.memory.governor import PROCESS_BYTES
from prima_core.memory.system import Memory, host
from prima_core.node.node import DATA_LIMITS, Dialer, Node, NodeOptions, longest_chunk, parse_bytes
from prima_core.plugins import Registry
from prima_core.ring import probes
from prima_core.testing.cluster import until

GB = 10**9


def dialer() -> Dialer:
    return Dialer(Registry.load({}), Credentials(), DATA_LIMITS)


def node(backend: str = "auto") -> Node:
    options = NodeOptions(backend, threads=1)
    return Node("n", Registry.load({}), options, dialer(), "ipc://", lambda report: None)


def test_a_started_node_tells_its_devices_its_address_and_why_this_backend(temporary_folder: Path) -> None:
    made = node()
    made.start()
    assert [device.id for device in made.devices] == ["numpy:cpu"]
    assert made.data_address.startswith(f"ipc://{temporary_folder}/")
    assert "numpy" in made.explanation
    made.close()
    made.close()


def test_a_closed_node_leaves_no_socket_and_no_thread(temporary_folder: Path) -> None:
    n_threads = psutil.Process().num_threads()
    made = node()
    made.start()
    sender = dialer().dial(made.data_address)
    sender.send([b"a stranger's frame"], 10)
    sender.close()
    made.close()
    assert list(temporary_folder.iterdir()) == []
    assert psutil.Process().num_threads() <= n_threads + 12, "nng keeps some threads of its own"
    with pytest.raises(LinkTimeout):
        dialer().dial(made.data_address).send([b""], 0.05)


def test_a_node_lets_go_of_probes_that_are_over(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ANSWER_S", 0.0)
    made = node()
    made.start()
    made.probes.answer(b"i" * 16, made.data_address)
    until("it is over", lambda: not made.probes._answering)
    made.close()


def test_a_node_that_is_never_started_opens_nothing(temporary_folder: Path) -> None:
    node()
    assert list(temporary_folder.iterdir()) == []


def test_a_backend_that_does_not_work_leaves_no_socket(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prima_mlx.plugin.find_spec", lambda name: None)
    made = node(backend="mlx")
    with pytest.raises(PluginError):
        made.start()
    assert list(temporary_folder.iterdir()) == []
    made.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 * 2**29),
        (" 4 gb ", 4_000_000_000),
        ("8kib", 8192),
        ("1e3B", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "4XB", "nan", "inf", "1e999", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


def test_a_node_leaves_a_reserve_to_others_unless_the_user_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(host()), "memory", lambda self: Memory(16 * GB, 13 * GB, mapped_bytes=400 * 10**6))
    assert NodeOptions().memory == 13 * GB - 400 * 10**6 - 1600 * 10**6 - PROCESS_BYTES
    assert NodeOptions(n_sharing=2).memory == 5500 * 10**6 - PROCESS_BYTES
    assert NodeOptions(memory_bytes=77, n_sharing=3).memory == 77


def test_the_longest_chunk_fits_a_message() -> None:
    for d_model in (64, 4096, 16384):
        assert longest_chunk(d_model) * d_model * 4 < DATA_LIMITS.max_message_bytes
