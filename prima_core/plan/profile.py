"""What a node found out about its machine. Pure data with a JSON round trip: it is kept, and told to the head."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from prima_core.plan.problem import DeviceFacts, Name, Rate, TypeRates, check_rates

MAX_DEVICES = 64


class DeviceRates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As in `DeviceFacts`: 0 where it is not known."""

    decode_bytes_s: Rate = 0.0
    prefill_bytes_s: Rate = 0.0
    rates: TypeRates = {}
    copy_bytes_s: Rate = 0.0

    def __post_init__(self) -> None:
        check_rates(self.rates)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`machine`: the same for all nodes of one machine ("": not known). `disk`, `disk_bytes_s` and `random_bytes_s` as
    in `NodeFacts`. `devices`: by their ids; empty: not measured.

    For people only: `memory_bytes_s`, what all cores together read from memory. 0: not known."""

    machine: Name = ""
    disk: Name = ""
    disk_bytes_s: Rate = 0.0
    devices: Annotated[dict[Name, DeviceRates], Meta(max_length=MAX_DEVICES)] = {}
    random_bytes_s: Rate = 0.0
    memory_bytes_s: Rate = 0.0

    def rated(self, device: DeviceFacts) -> DeviceFacts:
        """The device with its rates, as far as they are known."""
        rates = self.devices.get(device.id, DeviceRates())
        return msgspec.structs.replace(
            device,
            decode_bytes_s=rates.decode_bytes_s,
            prefill_bytes_s=rates.prefill_bytes_s,
            rates=rates.rates,
            copy_bytes_s=rates.copy_bytes_s,
        )
