"""The emulated network: rates are set where they belong, and everything gets through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prima_core.cage.cage import Cage
from prima_core.cage.limits import Limits
from prima_core.cage.network import Names, address, building, relay_links
from prima_core.cage.relay import MAX_WAITING_S, Pace
from prima_core.errors import ClusterError
from tests.cage.conftest import cage_of

LIMITS = Limits(64_000_000, 60_000_000, None, 10_000, None, 100_000_000, 0.0)
SERVE = """
import hashlib, socket
with socket.create_server(("0.0.0.0", 9000)) as server:
    print("listens", flush=True)
    peer, _ = server.accept()
    got = b""
    while part := peer.recv(1 << 20):
        got += part
    print("got", len(got), hashlib.sha256(got).hexdigest(), flush=True)
"""
SEND = """
import hashlib, random, socket, sys
data = random.Random(7).randbytes(1_000_000)
print("sends", len(data), hashlib.sha256(data).hexdigest(), flush=True)
socket.create_connection((sys.argv[1], 9000)).sendall(data)
"""


def asked(*command: str) -> Any:  # Any: JSON
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)


def send_a_million(cage: Cage) -> None:
    """From the second node to the first."""
    until_s = time.monotonic() + 30
    server = cage.start(cage.cells[0], [sys.executable, "-c", SERVE], os.environ)
    server.wait_for("^listens$", until_s)
    sender = cage.start(cage.cells[1], [sys.executable, "-c", SEND, address(0)], os.environ)
    sent = sender.wait_for("^sends (1000000 .*)", until_s)
    assert server.wait_for("^got (.*)", until_s)[1] == sent[1]


@pytest.mark.usefixtures("host")
def test_links_have_the_rate_of_their_node_in_both_directions(model: Path) -> None:
    nodes = '[defaults]\nmemory = "96MB"\n[[nodes]]\nname = "a"\n[[nodes]]\nname = "b"\nlink = "80Mbit/s"'
    with cage_of(nodes, model) as cage:
        hub = cage.cells[0].namespace.name.replace("node-a", "hub")
        node = cage.cells[1].namespace.name
        for namespace, device in ((hub, "port1"), (node, "eth0")):
            (bucket,) = asked("tc", "-n", namespace, "-j", "qdisc", "show", "dev", device)
            assert (bucket["kind"], bucket["options"]["rate"]) == ("tbf", 10_000_000)
        assert [one["kind"] for one in asked("tc", "-n", hub, "-j", "qdisc", "show", "dev", "port0")] == ["noqueue"]
        send_a_million(cage)
        (link,) = asked("ip", "-n", node, "-s", "-j", "link", "show", "dev", "eth0")
        assert link["stats64"]["tx"]["bytes"] >= 1_000_000


@pytest.mark.usefixtures("host")
def test_links_with_a_delay_go_through_the_relay_unchanged(model: Path) -> None:
    nodes = (
        '[defaults]\nmemory = "96MB"\n[[nodes]]\nname = "a"\n[[nodes]]\nname = "b"\nlink = "400Mbit/s"\ndelay_ms = 1'
    )
    with cage_of(nodes, model) as cage:
        send_a_million(cage)
        hub = cage.cells[0].namespace.name.replace("node-a", "hub")
        for device in ("line0", "line1"):  # behind the relay, of each node
            (link,) = asked("ip", "-n", hub, "-s", "-j", "link", "show", "dev", device)
            assert sum(link["stats64"][way]["bytes"] for way in ("rx", "tx")) >= 1_000_000


@pytest.mark.usefixtures("host")
def test_a_node_sees_its_own_network_alone(model: Path) -> None:
    with cage_of('[[nodes]]\nname = "a"\nmemory = "96MB"', model) as cage:
        program = cage.start(cage.cells[0], ["sh", "-c", "ip -br link | wc -l; sleep 1000"], os.environ)
        assert program.wait_for(r"^\d+$", time.monotonic() + 30)[0] == "2"  # lo and eth0


@pytest.mark.usefixtures("host")
def test_a_lost_relay_is_noticed(model: Path) -> None:
    nodes = '[[nodes]]\nname = "a"\nmemory = "96MB"\ndelay_ms = 1'
    with cage_of(nodes, model) as cage:
        cage.check_alive()
        hub = cage.cells[0].namespace.name.replace("node-a", "hub")
        subprocess.run(["ip", "-n", hub, "link", "delete", "line0"], check=True, timeout=30)
        relay = cage._programs[0]
        relay.wait_for("the relay has failed", time.monotonic() + 30)
        with pytest.raises(ClusterError, match="node relay"):
            relay.wait_for("never", time.monotonic() + 30)


# ---------------------------------------------------------------- without a kernel


def test_only_a_cluster_with_a_delay_has_a_relay() -> None:
    slow = replace(LIMITS, delay_s=0.002, link_bits_s=None)
    assert relay_links([("a", LIMITS), ("b", LIMITS)]) == []
    assert relay_links([("a", LIMITS), ("b", slow)]) == ["port0:line0:0.0:100000000", "port1:line1:0.002:0"]
    commands = [" ".join(command) for command in building(Names("run"), [("a", LIMITS), ("b", slow)])]
    assert not any("tbf" in command for command in commands)  # its frames would be too small for the relay
    assert all("run." in command for command in commands)  # so that they are found again


def test_frames_leave_one_after_the_other_at_the_rate_and_come_later() -> None:
    pace = Pace(0.5, 8000.0)  # 1000 bytes a second
    assert pace.due_s(100, 10.0) == pytest.approx(10.6)
    assert pace.due_s(50, 10.0) == pytest.approx(10.65)  # behind the first
    assert pace.due_s(100, 20.0) == pytest.approx(20.6)  # the link was free


def test_a_link_without_a_rate_only_delays() -> None:
    pace = Pace(0.25, 0.0)
    assert [pace.due_s(10**6, 1.0) for _ in range(3)] == [1.25, 1.25, 1.25]


def test_what_would_wait_too_long_is_dropped() -> None:
    pace = Pace(0.0, 8000.0)
    assert pace.due_s(int(1000 * MAX_WAITING_S) + 1, 0.0) is not None
    assert pace.due_s(1, 0.0) is None
    assert pace.due_s(1, 1.0) is not None
