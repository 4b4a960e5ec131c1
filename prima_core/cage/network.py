"""The emulated network: a namespace for each node, joined by a switch in one of its own. Linux, by `ip` and `tc`.

Nothing of the machine's own network is touched or seen. A node's frames go

    eth0 (node) - port (hub) [- relay - line (hub)] - plug (hub) - switch

Where no link has a delay, `tc tbf` limits the rate at eth0 and at the port. Where one has, every link has a relay, a
process that delays frames and limits their rate: it hands them on unread, so every protocol goes through it and no
address changes for it. (It would not keep up behind tbf, which cuts the kernel's segments of 64 KB into 1500 bytes.)
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
                hint="it needs network namespaces, veth, bridges and tbf of the kernel, and a container privileges",
            )


def building(names: Names, nodes: Sequence[tuple[str, Limits]]) -> Iterator[Command]:
    """The commands that make the network, in order."""
    hub, relayed = names.hub, bool(relay_links(nodes))
    yield ["ip", "netns", "add", hub]
    yield from _in(hub, "link add switch type bridge", "link set switch up")
    for rank, (name, limits) in enumerate(nodes):
        node, port = names.node(name), f"port{rank}"
        yield from _node(hub, node, rank)
        if relayed:
            yield from _in(hub, f"link add line{rank} type veth peer name plug{rank}", f"link set line{rank} up")
        plug = f"plug{rank}" if relayed else port
        yield from _in(hub, f"link set {plug} master switch", f"link set {plug} up")
        if limits.link_bits_s is not None and not relayed:
            yield _bucket(hub, port, limits.link_bits_s)
            yield _bucket(node, "eth0", limits.link_bits_s)


def _node(hub: str, node: str, rank: int) -> Iterator[Command]:
    port = f"port{rank}"
    yield ["ip", "netns", "add", node]
    yield from _in(hub, f"link add {port} type veth peer name eth0 netns {node}", f"link set {port} up")
    yield from _in(node, f"addr add {address(rank)}/24 dev eth0", "link set eth0 up", "link set lo up")


def _in(namespace: str, *changes: str) -> Iterator[Command]:
    for change in changes:
        yield ["ip", "-n", namespace, *change.split()]


def _bucket(namespace: str, device: str, bits_s: int) -> Command:
    """A small bucket, so that what follows a pause does not pass for free; room for 0.2 s behind it."""
    burst = max(2 * FRAME_BYTES, int(bits_s / 8 * 0.0002))
    room = max(256 * 1024, int(bits_s / 8 * 0.2))
    settings = f"tbf rate {bits_s}bit burst {burst} limit {room}"
    return ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *settings.split()]


def relay_links(nodes: Sequence[tuple[str, Limits]]) -> list[str]:
    """What the relay is told; nothing where no link has a delay."""
    if not any(limits.delay_s for _, limits in nodes):
        return []
    links = enumerate(limits for _, limits in nodes)
    return [f"port{rank}:line{rank}:{limits.delay_s}:{limits.link_bits_s or 0}" for rank, limits in links]


def remove_namespaces(prefix: str) -> None:
    """Those that begin so; their links go with them. Raises OSError when one stays."""
    for name in sorted(path.name for path in NAMESPACES.glob(f"{prefix}*")):
        done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True, timeout=30, check=False)
        if namespace(name).exists():
            raise OSError(f"network namespace {name} stays: {done.stderr.strip()}")
