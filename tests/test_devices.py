"""What `--backend` means, and several backends behind one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from prima_core.devices import DeviceSet, Opened, choose_devices, open_devices
from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import Backend, BackendOptions, Device, Shard, Slice, Store
from prima_core.model.spec import ModelSpec

OPTIONS = BackendOptions()


class NamedBackend:
    """Knows only its own name for `kernels`."""

    def __init__(self, *ids: str, breaks_at_close: bool = False) -> None:
        self.ids = list(ids)
        self.options = OPTIONS
        self.loaded: list[str] = []
        self.n_closed = 0
        self.breaks_at_close = breaks_at_close

    def devices(self) -> Sequence[Device]:
        return [Device(id_, 100, shares_host=not id_.endswith("cuda")) for id_ in self.ids]

    def describe(self) -> Mapping[str, str]:
        return {"version": "1"}

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        self.loaded.append(device)
        return cast("Shard", self)

    def close(self) -> None:
        self.n_closed += 1
        if self.breaks_at_close:
            raise OSError("stuck")


class Shelf:
    """The registry's part: backends by name."""

    stops_at_faults = False

    def __init__(self, **ids: str) -> None:
        self.cpu_only: set[str] = set()
        self.set_wrongly: set[str] = set()
        self.lacks: dict[str, str] = {}
        self.backends = {name: NamedBackend(*(f"{name}:{where}" for where in ids[name].split())) for name in ids}

    @property
    def backend_names(self) -> Sequence[str]:
        return tuple(self.backends)

    def is_cpu_only(self, name: str) -> bool:
        return name in self.cpu_only

    def is_set_wrongly(self, name: str) -> bool:
        return name in self.set_wrongly

    def lack(self, name: str) -> str:
        return self.lacks.get(name, "")

    def open_one(self, name: str, options: BackendOptions) -> Opened:
        if name not in self.backends:
            raise PluginError(f"there is no backend {name!r}")
        if options.kernels not in ("auto", name):
            raise ConfigError(f"kernels {options.kernels!r} are unknown")
        backend = self.backends[name]
        backend.options = options
        return Opened(backend, backend.devices())

    def opinion(self, candidates: Sequence[Device], model: ModelSpec | None) -> None:
        return None

    def close_one(self, name: str, backend: Backend) -> None:
        backend.close()

    def ids(self, choice: str) -> list[str]:
        return [device.id for device in open_devices(self, choice, OPTIONS, None)[0].devices()]

    @property
    def closed(self) -> set[str]:
        return {name for name, backend in self.backends.items() if backend.n_closed}


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(mlx="cpu", numpy="cpu", torch="cuda:0 cuda:1 cpu")


# ---------------------------------------------------------------- as asked


@pytest.mark.parametrize(
    ("choice", "ids"),
    [
        ("torch", ["torch:cuda:0", "torch:cuda:1"]),
        ("numpy", ["numpy:cpu"]),
        ("torch:cpu", ["torch:cpu"]),
        ("torch:cuda:1,numpy:cpu", ["torch:cuda:1", "numpy:cpu"]),
        (" numpy , torch:cuda:0 ", ["numpy:cpu", "torch:cuda:0"]),
        ("torch:cuda:1,torch", ["torch:cuda:1", "torch:cuda:0"]),
    ],
)
def test_a_list_names_backends_and_devices_in_order_of_preference(shelf: Shelf, choice: str, ids: list[str]) -> None:
    assert shelf.ids(choice) == ids
    assert shelf.closed == set()


@pytest.mark.parametrize(
    ("choice", "kind", "says"),
    [
        ("torch:cuda:7", PluginError, "no device 'torch:cuda:7' .*has: torch:cuda:0, torch:cuda:1, torch:cpu"),
        ("numpy,torhc", PluginError, "no backend 'torhc'"),
        ("auto,numpy", ConfigError, "is 'auto,numpy' .*mlx, numpy, torch"),
        ("numpy,", ConfigError, "is 'numpy,'"),
        ("", ConfigError, "is ''"),
    ],
)
def test_a_wrong_name_is_an_error_that_lists_what_is_there(
    shelf: Shelf, choice: str, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        open_devices(shelf, choice, OPTIONS, None)


def test_what_was_opened_before_an_error_is_closed(shelf: Shelf) -> None:
    with pytest.raises(PluginError):
        open_devices(shelf, "numpy,torch:cuda:7", OPTIONS, None)
    assert shelf.closed == {"numpy", "torch"}


def test_names_of_kernels_are_for_the_backend_that_knows_them(shelf: Shelf) -> None:
    open_devices(shelf, "torch,numpy", BackendOptions(threads=3, kernels="numpy"), None)
    assert shelf.backends["numpy"].options == BackendOptions(threads=3, kernels="numpy")
    assert shelf.backends["torch"].options == BackendOptions(threads=3, kernels="auto")


def test_names_of_kernels_that_none_knows_are_an_error(shelf: Shelf) -> None:
    with pytest.raises(ConfigError, match="'abacus'"):
        open_devices(shelf, "torch,numpy", BackendOptions(kernels="abacus"), None)
    with pytest.raises(ConfigError, match="'abacus'"):
        open_devices(shelf, "auto", BackendOptions(kernels="abacus"), None)


# ---------------------------------------------------------------- the best


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ("torch:cpu numpy:cpu", "numpy:cpu"),
        ("mlx:cpu torch:cpu", "mlx:cpu"),
        ("numpy:cpu torch:cuda torch:cpu", "torch:cuda numpy:cpu"),
        ("mlx:gpu mlx:cpu numpy:cpu torch:cpu", "mlx:gpu numpy:cpu"),
        ("mlx:gpu torch:cuda torch:cpu mlx:cpu", "torch:cuda torch:cpu"),
        ("mlx:cuda torch:cuda:0 torch:cuda:1", "torch:cuda:0 torch:cuda:1"),
        ("a:gpu b:gpu", "a:gpu"),
        ("torch:cuda:0 torch:cuda:1", "torch:cuda:0 torch:cuda:1"),
    ],
)
def test_core_chooses_the_accelerators_of_one_backend_and_a_cpu(candidates: str, chosen: str) -> None:
    devices = [Device(id_, 1, shares_host="cuda" not in id_) for id_ in candidates.split()]
    assert choose_devices(devices) == chosen.split()


def test_what_is_not_used_is_closed(shelf: Shelf) -> None:
    assert shelf.ids("auto") == ["torch:cuda:0", "torch:cuda:1", "numpy:cpu"]
    assert shelf.closed == {"mlx"}


def test_a_backend_with_nothing_but_a_cpu_is_not_opened_where_another_has_one(shelf: Shelf) -> None:
    shelf.cpu_only = {"mlx"}
    _, why = open_devices(shelf, "auto", OPTIONS, None)
    assert shelf.closed == set()
    assert why == (
        "computing on torch:cuda:0, torch:cuda:1, numpy:cpu;"
        " not on torch:cpu, mlx (may be the same hardware; --backend can name them)"
    )


def test_the_line_says_what_keeps_a_backend_from_its_best() -> None:
    shelf = Shelf(numpy="cpu", torch="cpu")
    shelf.cpu_only, shelf.lacks = {"torch"}, {"torch": "built without CUDA"}
    _, why = open_devices(shelf, "auto", OPTIONS, None)
    assert why == (
        "computing on numpy:cpu; not on torch (may be the same hardware; --backend can name them);"
        " torch: built without CUDA"
    )
    assert (
        open_devices(shelf, "torch", OPTIONS, None)[1] == "computing on torch:cpu, as asked; torch: built without CUDA"
    )
    assert open_devices(shelf, "torch:cpu", OPTIONS, None)[1] == "computing on torch:cpu, as asked"
    with pytest.raises(PluginError, match=r"no device 'torch:cuda:0' .*has: torch:cpu, built without CUDA; .*doctor"):
        open_devices(shelf, "torch:cuda:0", OPTIONS, None)


def test_names_of_kernels_that_a_backend_refuses_are_said(shelf: Shelf) -> None:
    _, why = open_devices(shelf, "auto", BackendOptions(kernels="torch"), None)
    assert why == "computing on torch:cuda:0, torch:cuda:1, torch:cpu; mlx: kernels 'torch' are unknown; " + (
        "numpy: kernels 'torch' are unknown"
    )


def test_no_other_computes_for_a_backend_that_the_user_set_wrongly(shelf: Shelf) -> None:
    shelf.set_wrongly = {"numpy"}
    with pytest.raises(ConfigError, match="kernels 'mlx' are unknown"):
        open_devices(shelf, "auto", BackendOptions(kernels="mlx"), None)
    assert shelf.closed == {"mlx"}


def test_it_is_opened_where_no_other_has_a_cpu() -> None:
    shelf = Shelf(mlx="cpu", other="gpu")
    shelf.cpu_only = {"mlx"}
    assert shelf.ids("auto") == ["other:gpu", "mlx:cpu"]


# ---------------------------------------------------------------- the set


def test_a_part_is_loaded_by_the_backend_that_owns_the_device() -> None:
    a, b = NamedBackend("a:gpu", "a:cpu"), NamedBackend("b:cpu")
    both = DeviceSet({"a": a, "b": b}, ("b:cpu", "a:gpu"))
    for device in ("a:gpu", "b:cpu"):
        both.load(cast("ModelSpec", None), device, Slice(()), cast("Store", None))
    assert (a.loaded, b.loaded) == (["a:gpu"], ["b:cpu"])
    with pytest.raises(PluginError, match=r"'a:cpu' is no device of this node .*b:cpu, a:gpu"):
        both.load(cast("ModelSpec", None), "a:cpu", Slice(()), cast("Store", None))
    assert both.describe() == {"a version": "1", "b version": "1"}


def test_a_device_that_has_gone_is_an_error() -> None:
    a = NamedBackend("a:gpu", "a:cpu")
    only = DeviceSet({"a": a}, ("a:gpu",))
    a.ids.remove("a:gpu")
    with pytest.raises(PluginError, match="'a:gpu' is not there any more"):
        only.devices()


def test_all_backends_are_closed_even_if_one_fails() -> None:
    a, b = NamedBackend("a:gpu", breaks_at_close=True), NamedBackend("b:gpu", breaks_at_close=True)
    with pytest.raises(OSError, match="stuck"):
        DeviceSet({"a": a, "b": b}, ("a:gpu", "b:gpu")).close()
    assert (a.n_closed, b.n_closed) == (1, 1)
