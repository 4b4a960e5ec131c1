"""MLX as a backend: one device, the GPU where MLX has one (Metal, or CUDA), else the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from prima_core.arch.fits import check_fits
from prima_core.arch.shard import OpsShard
from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import BackendOptions, Device, Shard, Slice, Store
from prima_core.model.spec import ModelSpec
from prima_mlx import memory
from prima_mlx.ops import MlxOps
from prima_mlx.quant import device_bytes, growth


class MlxBackend:
    """Raises ConfigError for kernels other than MLX's own ("auto"). Threads are MLX's own too: what is asked for is
    not looked at."""

    def __init__(self, options: BackendOptions, available: Callable[[], int] = memory.available_bytes) -> None:
        if options.kernels != "auto":
            raise ConfigError(f"kernels {options.kernels!r} are unknown to the mlx backend", hint="one of: auto")
        self._available = available
        self._device = "mlx:gpu" if memory.has_gpu() else "mlx:cpu"
        self._ops = MlxOps(half_attention=memory.has_gpu(), available=available)

    def devices(self) -> Sequence[Device]:
        facts = self.describe()
        shares_host = memory.has_metal() or not memory.has_gpu()
        summary = f"{facts['device']}, {facts['kernels']}"
        return [Device(self._device, self._available(), summary, shares_host, growth(), copies=True)]

    def describe(self) -> Mapping[str, str]:
        kernels = (
            "Metal" if memory.has_metal() else "CUDA" if memory.has_gpu() else "MLX's for a CPU, to try things out"
        )
        return {"device": memory.device_name(), "kernels": kernels, "library": f"mlx {version('mlx')}"}

    def ops(self, device: str) -> MlxOps:
        """Raises PluginError for a device that is not there."""
        if device != self._device:
            raise PluginError(f"backend 'mlx' has no device {device!r}", hint=f"it has {self._device}")
        return self._ops

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        """See `Backend.load`. Weights are repacked, piece by piece; from then on the map is not needed."""
        ops = self.ops(device)
        check_fits(device, self._available(), model, part, store, device_bytes)
        memory.set_limits()
        return OpsShard(ops, model, part, store)

    def close(self) -> None:
        memory.give_back()
