"""A node measures its machine, or takes what an earlier start has kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from prima_core.interfaces import Device
from prima_core.memory.disks import disk_name, machine_name, whole_disk
from prima_core.memory.system import System
from prima_core.model.weights import Model
from prima_core.node.measure import disk_rate, memory_rate, random_disk_rate
from prima_core.node.node import Node
from prima_core.node.profiles import Profiles, key_of
from prima_core.node.turns import turn
from prima_core.plan.profile import DeviceRates, Profile

SMALL_BYTES = 64 * 1024 * 1024
"""A model that is computed in no time however it is laid out: measuring would take longer than it serves for."""
DRIFT = 0.25
"""What is looked at again of a kept profile is so different: all of it is out of date."""
LOOKS = 2
WAIT_S = 60.0
GIVE_UP_AFTER_S = 30.0
HANGS_AFTER_S = 15.0
"""A backend that was asked to give up and has not answered for so long is not waited for."""
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Measurer:
    """`stop`: whether to give up; what was not found out by then counts as not known."""

    profiles: Profiles
    system: System
    tell: Callable[[str], None]
    stop: Callable[[], bool] = lambda: False

    def profile(self, node: Node, model: Model, memory_bytes: int) -> Profile:
        """Of a node that has started and loaded nothing. Where it was measured before it is only looked at whether it
        still decodes as fast, and whether its disk is as fast, if a node with so much memory would stream this model.
        Raises OSError where the model's file has gone."""
        if model.file.size < SMALL_BYTES:
            return Profile(machine_name())
        with self._turn():
            kept = self._kept(node, model)
            if kept is not None and self._still_holds(kept, node, model, memory_bytes):
                return kept
            return self._measure(node, model, memory_bytes)

    def measure(self, node: Node, model: Model, memory_bytes: int) -> Profile:
        """As `profile`, whatever is kept."""
        with self._turn():
            return self._measure(node, model, memory_bytes)

    def _turn(self) -> AbstractContextManager[None]:
        return turn(self.profiles.lock, WAIT_S, self.stop)

    def _kept(self, node: Node, model: Model) -> Profile | None:
        return kept_profile(self.profiles, node.devices, model)

    def _still_holds(self, kept: Profile, node: Node, model: Model, memory_bytes: int) -> bool:
        now = disk_rate(_paths(model), memory_bytes, self.system)
        if _has_drifted(now, kept.disk_bytes_s):
            self.tell(f"the disk gives {now / 1e6:,.0f} MB/s, {kept.disk_bytes_s / 1e6:,.0f} were measured before")
            return False
        for _ in range(LOOKS):  # another program may have been at work for a moment
            said = self._computes_otherwise(kept, node, model, memory_bytes)
            if not said:
                return True
        self.tell(said)
        return False

    def _computes_otherwise(self, kept: Profile, node: Node, model: Model, memory_bytes: int) -> str:
        """How, in words; "": it does not."""
        for device, rates in self._rates(node, model, memory_bytes, is_brief=True).items():
            before = kept.devices.get(device, DeviceRates()).decode_bytes_s
            if _has_drifted(rates.decode_bytes_s, before):
                now, before = rates.decode_bytes_s / 1e9, before / 1e9
                return f"{device} computes {now:,.2f} GB of weights a second, {before:,.2f} were measured before"
        return ""

    def _measure(self, node: Node, model: Model, memory_bytes: int) -> Profile:
        self.tell("measuring how fast this machine reads and computes, some seconds; it is kept for the next start ...")
        paths = _paths(model)
        profile = Profile(
            machine_name(),
            disk_name(model.path),
            disk_bytes_s=disk_rate(paths, 0, self.system),
            random_bytes_s=random_disk_rate(paths, self.system),
            memory_bytes_s=memory_rate(min(memory_bytes, self.system.memory().available_bytes)),
        )
        if not self.stop():
            computing = ", ".join(device.id for device in node.devices)
            self.tell(f"disk: {profile.disk_bytes_s / 1e9:,.2f} GB/s; now computing on {computing} ...")
            profile = replace(profile, devices=self._rates(node, model, memory_bytes))
        if not self.stop():
            self._keep(profile, node, model)
        return profile

    def _keep(self, profile: Profile, node: Node, model: Model) -> None:
        """Only a whole one: a device that failed once is not to count as unknown at every start."""
        unknown = _unknown(profile, node.devices)
        if not unknown:
            self.profiles.save(_key(node.devices, model), profile)
        else:
            self.tell(
                f"how fast {', '.join(unknown)} computes is not known (see the log): the next start measures again"
            )

    def _rates(self, node: Node, model: Model, memory_bytes: int, is_brief: bool = False) -> dict[str, DeviceRates]:
        until_s = time.monotonic() + GIVE_UP_AFTER_S

        def stop() -> bool:
            return self.stop() or time.monotonic() > until_s

        result = node.worker.measure(model, memory_bytes, stop, is_brief)
        while not self.stop():
            with suppress(NotYet):
                return result.result(_LOOK_S)
            if time.monotonic() > until_s + HANGS_AFTER_S:
                self.tell("a device hangs (see `prima doctor`)")
                break
        return {}


def _has_drifted(now: float, before: float) -> bool:
    """0 is not known."""
    return bool(now and before) and abs(now - before) > DRIFT * before


def kept_profile(profiles: Profiles, devices: Sequence[Device], model: Model) -> Profile | None:
    """What was found out before of all such devices of this machine; None: nothing."""
    kept = profiles.load(_key(devices, model))
    return (
        None
        if kept is None or _unknown(kept, devices)
        else replace(kept, machine=machine_name(), disk=disk_name(model.path))
    )


def _unknown(profile: Profile, devices: Sequence[Device]) -> list[str]:
    return [device.id for device in devices if device.id not in profile.devices]


def _key(devices: Sequence[Device], model: Model) -> str:
    return key_of(model, devices, whole_disk(model.path) or str(model.path.stat().st_dev))


def _paths(model: Model) -> list[Path]:
    return [part.path for part in model.file.parts]
