"""A backend whose devices have other names and other memory than the host's processor, which computes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prima_core.arch.fits import check_fits
from prima_core.interfaces import Backend, BackendOptions, Device, Layers, Shard, Slice, Store, Weight
from prima_core.model.spec import ModelSpec
from prima_numpy.backend import NumpyBackend
from tests.site import Site

PLUGIN = """
from tests.node.fakegpu import FakeGpu

made = []

def open_backend(options):
    made.append(FakeGpu(options, {arguments}))
    return made[-1]

@hookimpl
def prima_backends():
    return [BackendPlugin("fakegpu", 1, lambda: Probe(True), open_backend)]
"""


def add_fake_gpu(site: Site, **arguments: object) -> None:
    """Install it; the arguments are those of FakeGpu."""
    site.add("fakegpu", PLUGIN.format(arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items())))


@dataclass
class FakeGpu:
    """`sizes`: memory of each device, by its id. `free`: what is found of it when something is to be loaded; a device
    that `notices` says so from then on. One that `copies` weights computes with torch, or with what `by` says."""

    options: BackendOptions
    sizes: dict[str, int]
    free: Mapping[str, int] = field(default_factory=dict)
    notices: bool = True
    shares_host: bool = False
    growth: Mapping[str, float] = field(default_factory=dict)
    copies: bool = False
    by: str = "torch"
    loaded: list[tuple[str, tuple[Layers, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cpu: Backend = NumpyBackend(self.options)
        options = BackendOptions(self.options.threads)
        if self.copies and self.by == "mlx":
            from prima_mlx.backend import MlxBackend

            self._cpu = MlxBackend(options)
        elif self.copies:
            from prima_torch.backend import TorchBackend  # takes a second

            self._cpu = TorchBackend(options)

    def devices(self) -> Sequence[Device]:
        return [
            Device(id_, size, "fake", self.shares_host, self.growth, self.copies) for id_, size in self.sizes.items()
        ]

    def describe(self) -> Mapping[str, str]:
        return {"driver": "none"}

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        free = self.free.get(device, self.sizes[device])
        if self.notices:
            self.sizes[device] = free
        check_fits(device, free, model, part, store, self._size)
        self.loaded.append((device, part.layers))
        return self._cpu.load(model, f"{self.by}:cpu" if self.copies else "numpy:cpu", part, store)

    def close(self) -> None:
        self._cpu.close()

    def _size(self, weight: Weight) -> int:
        return round(weight.data.nbytes * self.growth.get(weight.type.name, 1.0))
