"""The emulated network: a namespace for each node, joined by a switch in a namespace of its own. Linux, by `ip` and `tc`.

Nothing of the machine's own network is touched or seen. A node's frames go

    eth0 (node) - port (hub) [- relay - line (hub)] - plug (hub) - switch

with `tc tbf` limiting the rate towards the switch and towards the node. The relay, a process, is there only where the
link has a delay; it hands frames on unread, so every protocol goes through it, and no address changes for it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prima_core.cage.limits import Limits
from prima_core.errors import ConfigError

NAMESPACES = Path("/run/netns")
NETWORK = "10.77.0"
FRAME_BYTES = 1514
Command = list[str]


@dataclass(frozen=True, slots=True)
class Names:
    """How the parts of a run are called: names of one run begin alike, and no other's do."""

    run: str

    @property
    def hub(self) -> str:
        return f"{self.run}.hub"

    def node(self, name: str) -> str:
        return f"{self.run}.node-{name}"


def address(rank: int) -> str:
    return f"{NETWORK}.{rank + 1}"


def namespace(name: str) -> Path:
    return NAMESPACES / name


def build(names: Names, nodes: Sequence[tuple[str, Limits]]) -> None:
    """Make the namespaces and links. Raises ConfigError when the kernel does not let us."""
    for command in building(names, nodes):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise ConfigError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()}",
                hint="the kernel has to have network namespaces, veth, bridges and tbf; a container has to be privileged",
            )


def building(names: Names, nodes: Sequence[tuple[str, Limits]]) -> Iterator[Command]:
    """The commands that make the network, in order."""
    hub = names.hub
    yield ["ip", "netns", "add", hub]
    yield from _in(hub, "link add switch type bridge", "link set switch up")
    for rank, (name, limits) in enumerate(nodes):
        yield from _node(hub, names.node(name), rank, limits)


def _node(hub: str, node: str, rank: int, limits: Limits) -> Iterator[Command]:
    port, plug, line = f"port{rank}", f"plug{rank}", f"line{rank}"
    yield ["ip", "netns", "add", node]
    yield from _in(hub, f"link add {port} type veth peer name eth0 netns {node}", f"link set {port} up")
    yield from _in(node, f"addr add {address(rank)}/24 dev eth0", "link set eth0 up", "link set lo up")
    if limits.delay_s:
        yield from _in(hub, f"link add {line} type veth peer name {plug}", f"link set {line} up")
    else:
        plug = port
    yield from _in(hub, f"link set {plug} master switch", f"link set {plug} up")
    if limits.link_bits_s is not None:
        yield _bucket(hub, port, limits.link_bits_s)
        yield _bucket(*((hub, line) if limits.delay_s else (node, "eth0")), limits.link_bits_s)


def _in(namespace: str, *changes: str) -> Iterator[Command]:
    for change in changes:
        yield ["ip", "-n", namespace, *change.split()]


def _bucket(namespace: str, device: str, bits_s: int) -> Command:
    """A small bucket, so that what follows a pause does not pass for free; room for 0.2 s behind it."""
    burst = max(2 * FRAME_BYTES, int(bits_s / 8 * 0.0002))
    room = max(256 * 1024, int(bits_s / 8 * 0.2))
    settings = f"tbf rate {bits_s}bit burst {burst} limit {room}"
    return ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *settings.split()]


def delays(nodes: Sequence[tuple[str, Limits]]) -> list[str]:
    """What the relay is told: a link each, its ends in the hub and its delay in seconds."""
    return [f"port{rank}:line{rank}:{limits.delay_s}" for rank, (_, limits) in enumerate(nodes) if limits.delay_s]


def remove_namespaces(prefix: str) -> None:
    """Those that begin so; their links go with them. Raises OSError when one stays."""
    for name in sorted(path.name for path in NAMESPACES.glob(f"{prefix}*")):
        done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True, timeout=30, check=False)
        if namespace(name).exists():
            raise OSError(f"network namespace {name} stays: {done.stderr.strip()}")
