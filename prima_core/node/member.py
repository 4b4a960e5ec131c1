"""A node of the cluster as the planner sees it, and what changes of it while it is there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from prima_core.plan.problem import DeviceFacts, LinkFacts, NodeFacts


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the cluster as the planner sees it. `data_address` is where activations are sent to; `disk_bytes_s`,
    `disk` and `random_bytes_s` as in `NodeFacts`; `links`: those to and from nodes that were there before it."""

    name: str
    memory_bytes: int
    devices: tuple[DeviceFacts, ...]
    data_address: str
    disk_bytes_s: float = 0.0
    disk: str = ""
    links: tuple[LinkFacts, ...] = ()
    random_bytes_s: float = 0.0

    @property
    def facts(self) -> NodeFacts:
        disk = self.disk_bytes_s, self.disk, self.random_bytes_s
        return NodeFacts(self.name, self.memory_bytes, self.devices, *disk)

    @property
    def is_measured(self) -> bool:
        """Whether it is known how fast each of its devices computes."""
        return all(device.decode_bytes_s for device in self.devices)

    def with_at_most(self, device: str, memory_bytes: int) -> Member:
        """The node with less memory on a device."""
        smaller = (
            msgspec.structs.replace(known, memory_bytes=min(known.memory_bytes, memory_bytes))
            if known.id == device
            else known
            for known in self.devices
        )
        return replace(self, devices=tuple(smaller))

    def computing(self, times: float) -> Member:
        """The node with devices that compute so many times as fast."""

        def faster(device: DeviceFacts) -> DeviceFacts:
            rates = {name: tuple((n, times * rate) for n, rate in widths) for name, widths in device.rates.items()}
            decode, prefill = times * device.decode_bytes_s, times * device.prefill_bytes_s
            return msgspec.structs.replace(device, rates=rates, decode_bytes_s=decode, prefill_bytes_s=prefill)

        return replace(self, devices=tuple(map(faster, self.devices)))

    def with_link(self, link: LinkFacts) -> Member:
        """With a link that it knows as it is now."""
        links = (link if (one.source, one.target) == (link.source, link.target) else one for one in self.links)
        return replace(self, links=tuple(links))
