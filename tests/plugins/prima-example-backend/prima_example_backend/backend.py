"""One device, the CPU. Weights stay in the mapped file and are widened anew for every product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prima_core.arch.fits import check_fits
from prima_core.arch.shard import OpsShard
from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import BackendOptions, Device, Shard, Slice, Store
from prima_core.memory.system import host
from prima_core.model.spec import ModelSpec
from prima_example_backend.ops import Float64Ops

DEVICE = "float64:cpu"


class Float64Backend:
    def __init__(self, options: BackendOptions) -> None:
        if options.kernels != "auto":
            raise ConfigError(f"kernels {options.kernels!r} are unknown", hint="leave --kernels out")

    def devices(self) -> Sequence[Device]:
        return [Device(DEVICE, host().memory().available_bytes, "CPU, float64")]

    def describe(self) -> Mapping[str, str]:
        return {"arithmetic": "float64", "threads": "numpy's own"}

    def ops(self, device: str) -> Float64Ops:
        """Not part of the Protocol: with it `check_backend` tries each operation alone."""
        if device != DEVICE:
            raise PluginError(f"backend 'float64' has no device {device!r}", hint=f"it has {DEVICE}")
        return Float64Ops()

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        ops = self.ops(device)
        check_fits(device, host().memory().available_bytes, model, part, store)
        return OpsShard(ops, model, part, store)

    def close(self) -> None:
        """Nothing is kept outside the shards."""
