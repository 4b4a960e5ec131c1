"""torch as a backend: NVIDIA's GPUs, by Triton kernels where Triton is, and every CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import torch

from prima_core.arch.fits import check_fits
from prima_core.errors import ConfigError, DeviceMemoryError, PluginError
from prima_core.interfaces import BackendOptions, Device, Shard, Slice, Store
from prima_core.model.spec import ModelSpec
from prima_torch.memory import available_bytes, give_back
from prima_torch.ops import TorchOps
from prima_torch.shard import TorchShard
from prima_torch.support import Support, look

KINDS = ("auto", "triton", "torch")
CPU = torch.device("cpu")


class TorchBackend:
    """Raises ConfigError for unknown kernels or a negative thread count, PluginError for Triton that is not usable.

    `threads` hold for the whole process: torch has one pool.
    """

    def __init__(
        self,
        options: BackendOptions,
        support: Support | None = None,
        available: Callable[[torch.device], int] = available_bytes,
    ) -> None:
        if options.kernels not in KINDS:
            raise ConfigError(f"kernels {options.kernels!r} are unknown", hint=f"one of: {', '.join(KINDS)}")
        if options.threads < 0:
            raise ConfigError(f"{options.threads} threads cannot be", hint="0 leaves the choice to torch")
        self._support = support or look() or Support(torch.__version__, None, "")
        self._fault = "as asked" if options.kernels == "torch" else self._support.triton_fault
        if options.kernels == "triton" and self._fault:
            raise PluginError(f"Triton is not usable: {self._fault}", hint="leave --kernels at auto")
        self._on_cpu = options.kernels == "triton"  # in Triton's interpreter, which is for tests
        if options.threads:
            torch.set_num_threads(options.threads)
        self._available = available

    def devices(self) -> Sequence[Device]:
        return [self._described(device) for device in self._devices()]

    def describe(self) -> Mapping[str, str]:
        return {
            "torch": torch.__version__,
            "cuda": self._support.describe(),
            "kernels": f"torch's own: {self._fault}" if self._fault else f"triton {version('triton')}",
            "threads": str(torch.get_num_threads()),
        }

    def ops(self, device: str) -> TorchOps:
        """Raises PluginError for a device that is not there."""
        known = {_id(known): known for known in self._devices()}
        if device not in known:
            raise PluginError(f"backend 'torch' has no device {device!r}", hint=f"it has {', '.join(known)}")
        found = known[device]
        if not self.has_kernels(found):
            return TorchOps(found)
        from prima_torch.cuda_ops import CudaOps  # imports Triton

        return CudaOps(found)

    def has_kernels(self, device: torch.device) -> bool:
        """Whether Triton's kernels compute there: its compiler knows no GPU before Turing."""
        if self._fault or device == CPU:
            return not self._fault and self._on_cpu
        return torch.cuda.get_device_capability(device) >= (7, 5)

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        """See `Backend.load`. Weights and the KV that the plan counts with are taken now."""
        ops = self.ops(device)
        check_fits(device, self._available(ops.device), model, part, store)
        try:
            return TorchShard(ops, model, part, store, ops.recorder())
        except DeviceMemoryError as error:
            failed = error.with_traceback(None)
        failed.__cause__ = failed.__context__ = None  # the frames of both hold what was uploaded
        give_back(ops.device)
        # What was free was not in one piece, or another program was quicker: say it by what was got.
        check_fits(device, ops.uploaded_bytes, model, part, store)
        raise failed

    def close(self) -> None:
        """Nothing to give back: shards have what there is."""

    def _described(self, device: torch.device) -> Device:
        free = self._available(device)
        if device == CPU:
            summary = f"CPU, torch {torch.__version__}, {torch.get_num_threads()} threads"
            return Device(_id(device), free, summary, copies=True)
        facts = torch.cuda.get_device_properties(device)
        summary = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 1e9:.1f} GB"
        return Device(_id(device), free, summary, shares_host=False, copies=True)

    def _devices(self) -> list[torch.device]:
        n_gpus = 0 if self._support.fault else torch.cuda.device_count()
        return [*(torch.device("cuda", index) for index in range(n_gpus)), CPU]


def _id(device: torch.device) -> str:
    return f"torch:{device}"
