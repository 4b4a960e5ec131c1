"""Addresses as users write them, as they are bound, and as others are told them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prima_core.config import CLUSTER_PORT
from prima_core.errors import ConfigError
from prima_core.node.network import advertised, cluster_address, host_of, is_network, own_address_towards, with_port


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.168.1.5", f"tls+tcp://192.168.1.5:{CLUSTER_PORT}"),
        ("192.168.1.5:8000", "tls+tcp://192.168.1.5:8000"),
        ("desk.local:8000", "tls+tcp://desk.local:8000"),
        ("[fd00::1]:8000", "tls+tcp://[fd00::1]:8000"),
        ("tcp://desk:1", "tcp://desk:1"),
        ("ipc:///run/prima/head", "ipc:///run/prima/head"),
    ],
)
def test_a_head_without_a_scheme_is_reached_encrypted(text: str, address: str) -> None:
    assert cluster_address(text) == address


@pytest.mark.parametrize("text", ["", ":7747", "desk:port", "desk:99999", "[::1"])
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_address(text)
    assert "192.168.1.5:7747" in caught.value.hint


@pytest.mark.parametrize(
    ("address", "other"),
    [
        ("tcp://10.0.0.1:7747", "tcp://10.0.0.1:0"),
        ("tls+tcp://[::]:7747", "tls+tcp://[::]:0"),
        ("ipc:///run/prima/head", "ipc://"),
        ("unix:///run/prima/head", "unix://"),
        ("inproc://head", "inproc://"),
    ],
)
def test_another_port_of_the_same_host_or_a_fresh_name(address: str, other: str) -> None:
    assert with_port(address, 0) == other


def test_what_was_bound_is_advertised() -> None:
    assert advertised("tcp://10.0.0.1:7747", None) == "tcp://10.0.0.1:7747"
    assert advertised("ipc:///run/prima/head", "desk.local") == "ipc:///run/prima/head"


def test_the_user_may_say_what_is_advertised() -> None:
    assert advertised("tls+tcp://0.0.0.0:7747", "desk.local") == "tls+tcp://desk.local:7747"
    assert advertised("tcp://10.0.0.1:7747", "fd00::1") == "tcp://[fd00::1]:7747"


@pytest.mark.parametrize("anywhere", ["0.0.0.0", "[::]"])
def test_an_address_of_every_interface_is_advertised_as_one_of_them(
    anywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prima_core.node.network.own_address_towards", lambda host: "10.0.0.7")
    assert advertised(f"tcp://{anywhere}:7747", None) == "tcp://10.0.0.7:7747"


def test_the_way_to_this_machine_starts_at_this_machine() -> None:
    assert own_address_towards("127.0.0.1") == "127.0.0.1"


def test_a_host_that_is_not_known_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError) as caught:
        own_address_towards("no-such-host")
    assert "--advertise" in caught.value.hint


def test_parts_of_addresses() -> None:
    assert host_of("tcp://[::1]:1") == "::1"
    assert all(map(is_network, ("tcp://a:1", "tls+tcp://a:1", "tcp://[::1]:0", "pigeon://a:1")))


@pytest.mark.parametrize("address", ["unix:///a", "ipc:///a", "ipc://a", "inproc://a"])
def test_addresses_within_a_computer_are_told_by_their_scheme(address: str) -> None:
    assert not is_network(address)


@pytest.mark.parametrize("place", ["", str(Path("a").absolute())])
def test_transports_of_plugins_are_within_a_computer_where_their_addresses_are_paths(place: str) -> None:
    address = f"pigeon://{place}"
    assert not is_network(address)
    assert with_port(address, 0) == "pigeon://"
    assert advertised(address, "a-host") == address
