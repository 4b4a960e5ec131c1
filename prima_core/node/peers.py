"""What other nodes tell, as the driver takes it."""

from __future__ import annotations

from prima_core.node.member import Member
from prima_core.plan.problem import LinkFacts
from prima_core.ring import control
from prima_core.ring.membership import PeerFacts
from prima_core.ring.reports import LoadFailed, Loading, Ready, Report, Unreachable


def member_of(facts: PeerFacts, links: tuple[LinkFacts, ...] = ()) -> Member:
    """A node as the planner sees it."""
    profile = facts.profile
    devices = tuple(map(profile.rated, facts.devices))
    disk = profile.disk_bytes_s, profile.disk
    return Member(
        facts.name, facts.memory_bytes, devices, facts.data_address, *disk, links, random_bytes_s=profile.random_bytes_s
    )


def report_of(message: control.Message) -> Report | None:
    """None: no worker says such a thing."""
    match message:
        case control.Progress(epoch=epoch, done_bytes=done, total_bytes=total):
            return Loading(epoch, done, total)
        case control.Ready(epoch=epoch):
            return Ready(epoch)
        case control.Refused(epoch=epoch, fault=fault, device=device, memory_bytes=memory_bytes):
            return LoadFailed(epoch, fault.error(), device, memory_bytes)
        case control.Unreachable(epoch=epoch, node=node, fault=fault):
            return Unreachable(epoch, node, fault.error())
        case _:
            return None
