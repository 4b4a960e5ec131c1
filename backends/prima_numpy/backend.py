"""The host's processor as a backend, with kernels of three kinds.

`native`: the compiled module. `int8`: its arithmetic in plain numpy. `exact`: float32 everything, K and V
included whatever `--kv-type` says, for tiny models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from prima_core.arch.fits import check_fits
from prima_core.arch.shard import OpsShard
from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import BackendOptions, Device, KvType, Shard, Slice, Store
from prima_core.memory.system import host
from prima_core.model.spec import ModelSpec
from prima_numpy.kernels import MAX_THREADS, Kernels, load_kernels
from prima_numpy.native_module import native_fault
from prima_numpy.ops import NativeOps, ReferenceOps, exact_product
from prima_numpy.twin import Int8Ops

log = logging.getLogger(__name__)

DEVICE = "numpy:cpu"
KINDS = ("auto", "native", "int8", "exact")
SLOW = "plain numpy: right, but some hundred times slower than the native kernels"


def available_bytes() -> int:
    """Memory that can be had without swapping, within the limits of this process's groups; what the page cache holds of
    the model counts as available."""
    return host().memory().available_bytes


class NumpyBackend:
    """Raises ConfigError for unknown kernels or a wrong thread count, PluginError for native that is not built."""

    def __init__(self, options: BackendOptions, available: Callable[[], int] = available_bytes) -> None:
        if options.kernels not in KINDS:
            raise ConfigError(f"kernels {options.kernels!r} are unknown", hint=f"one of: {', '.join(KINDS)}")
        if not 0 <= options.threads <= MAX_THREADS:
            hint = f"1 to {MAX_THREADS}; 0 leaves the choice to prima"
            raise ConfigError(f"{options.threads} threads cannot be", hint=hint)
        self._available = available
        self._kernels = _native(options) if options.kernels in ("auto", "native") else None
        self._kind = "int8" if options.kernels == "auto" else options.kernels
        self._ops = NativeOps(self._kernels) if self._kernels else _reference(self._kind)

    def devices(self) -> Sequence[Device]:
        facts = self.describe()
        return [Device(DEVICE, self._available(), f"CPU, {facts['kernels']}, {facts['threads']} threads")]

    def describe(self) -> Mapping[str, str]:
        if self._kernels:
            return self._kernels.describe()
        return {"kernels": self._kind, "threads": "numpy's own", "note": native_fault() or SLOW}

    def ops(self, device: str) -> ReferenceOps:
        """Raises PluginError for a device that is not there."""
        if device != DEVICE:
            raise PluginError(f"backend 'numpy' has no device {device!r}", hint=f"it has {DEVICE}")
        return self._ops

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        """See `Backend.load`. Weights stay in the map, but must fit in memory: each token reads all of them."""
        ops = self.ops(device)
        check_fits(device, self._available(), model, replace(part, kv_tokens=0), store)
        return OpsShard(ops, model, part, store)

    def close(self) -> None:
        """Nothing to give back: the kernels' threads sleep when idle, and end with the backend and its last shard."""


def _reference(kind: str) -> ReferenceOps:
    return ReferenceOps(exact_product, KvType.F32) if kind == "exact" else Int8Ops()


def _native(options: BackendOptions) -> Kernels | None:
    kernels = load_kernels(options.threads)
    if kernels is not None:
        return kernels
    if options.kernels == "native":
        raise PluginError(
            native_fault(), hint="install prima-llm where a C++ compiler is, or use another kind of kernels"
        )
    log.warning("%s; computing in %s", native_fault(), SLOW)
    return None
