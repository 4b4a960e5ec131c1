"""Which devices a node computes on: what the user asked for, or the best that are there, behind one `Backend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from prima_core.errors import ConfigError, PluginError, PrimaError
from prima_core.interfaces import Backend, BackendOptions, Device, Shard, Slice, Store

if TYPE_CHECKING:
    from prima_core.model.spec import ModelSpec

AUTO = "auto"


class DeviceSet:
    """Devices of one or several backends as one backend, in order of preference. Owns the backends."""

    def __init__(self, backends: Mapping[str, Backend], ids: Sequence[str]) -> None:
        self._backends = backends
        self._ids = tuple(ids)

    def devices(self) -> Sequence[Device]:
        """As they are now. Raises PluginError for one that has gone."""
        known = {device.id: device for backend in self._backends.values() for device in backend.devices()}
        for gone in (id_ for id_ in self._ids if id_ not in known):
            raise PluginError(f"device {gone!r} is not there any more", hint="start prima again")
        return [known[id_] for id_ in self._ids]

    def describe(self) -> Mapping[str, str]:
        """The facts of every backend, with its name in front."""
        facts = ((name, backend.describe()) for name, backend in self._backends.items())
        return {f"{name} {key}": fact for name, described in facts for key, fact in described.items()}

    def load(self, model: ModelSpec, device: str, part: Slice, store: Store) -> Shard:
        """Raises PluginError for a device that is not of the set, and what its backend raises."""
        if device not in self._ids:
            raise PluginError(f"{device!r} is no device of this node", hint=f"it has: {', '.join(self._ids)}")
        return self._backends[backend_of(device)].load(model, device, part, store)

    def close(self) -> None:
        """Closes all backends, even if one fails."""
        with ExitStack() as exits:
            for backend in self._backends.values():
                exits.callback(backend.close)


@dataclass(frozen=True, slots=True)
class Opened:
    backend: Backend
    devices: Sequence[Device]


class Backends(Protocol):
    """What is asked of the registry (`plugins.Registry`)."""

    @property
    def backend_names(self) -> Sequence[str]: ...
    @property
    def stops_at_faults(self) -> bool:
        """Whether there are faults, and a fault is an error."""
        ...

    def is_cpu_only(self, name: str) -> bool:
        """What its probe says."""
        ...

    def is_set_wrongly(self, name: str) -> bool:
        """Whether the user asked it for what cannot be, as its probe says: no other may be chosen instead."""
        ...

    def lack(self, name: str) -> str:
        """Why a backend is not usable, or what keeps it from its best, as its probe says; empty: nothing."""
        ...

    def open_one(self, name: str, options: BackendOptions) -> Opened:
        """Raises PluginError for a backend that is unknown, not usable or broken, ConfigError for a wrong option."""
        ...

    def opinion(self, candidates: Sequence[Device], model: ModelSpec | None) -> tuple[Sequence[str], str] | None:
        """Ids of the devices to use, best first, and which plugin says so."""
        ...

    def close_one(self, name: str, backend: Backend) -> None: ...


def open_devices(
    backends: Backends, choice: str, options: BackendOptions, model: ModelSpec | None
) -> tuple[DeviceSet, str]:
    """What `--backend` says; see `Registry.open_backend`."""
    if choice == AUTO:
        return _open_best(backends, options, model)
    wanted = [item.strip() for item in choice.split(",")]
    if AUTO in wanted or "" in wanted:
        raise ConfigError(
            f"--backend is {choice!r}",
            hint=f"{AUTO}, or names of backends ({', '.join(backends.backend_names)}) or devices, best first",
        )
    return _open_asked(backends, wanted, options)


def choose_devices(candidates: Sequence[Device]) -> list[str]:
    """Core's own choice: the accelerators of one backend, since two backends may mean the same GPU, then a CPU, which
    gets what does not fit them. GPUs with memory of their own come first, torch before other backends on these, numpy
    before others on a CPU."""
    accelerators = [device for device in candidates if not is_cpu(device.id)]
    best = min(accelerators, key=lambda device: (device.shares_host, backend_of(device.id) != "torch"), default=None)
    own = backend_of(best.id) if best is not None else ""
    cpus = [device.id for device in candidates if is_cpu(device.id)]
    cpus.sort(key=lambda id_: (backend_of(id_) != "numpy", backend_of(id_) != own))
    return [*(device.id for device in accelerators if backend_of(device.id) == own), *cpus[:1]]


def backend_of(device: str) -> str:
    """The backend's name in a device's id."""
    return device.partition(":")[0]


def is_cpu(device_id: str) -> bool:
    return device_id.partition(":")[2].startswith("cpu")


# ---------------------------------------------------------------- as asked


def _open_asked(backends: Backends, wanted: Sequence[str], options: BackendOptions) -> tuple[DeviceSet, str]:
    opened: dict[str, Opened] = {}
    try:
        _open_named(backends, dict.fromkeys(map(backend_of, wanted)), options, opened)
        meant = [id_ for item in wanted for id_ in _meant(backends, item, opened[backend_of(item)].devices)]
    except BaseException:
        _close_all(backends, opened)
        raise
    ids = tuple(dict.fromkeys(meant))
    lacks = {name: backends.lack(name) for name in wanted if name in opened}  # who names a device knows it
    return _device_set(opened, ids), "; ".join([f"computing on {', '.join(ids)}, as asked", *_lacking(lacks)])


def _open_named(backends: Backends, names: Iterable[str], options: BackendOptions, opened: dict[str, Opened]) -> None:
    """`kernels` are names of one backend: of several, those that do not know them choose for themselves."""
    refused: dict[str, ConfigError] = {}
    for name in names:
        try:
            opened[name] = backends.open_one(name, options)
        except ConfigError as error:
            refused[name] = error
    if refused and not opened:
        raise next(iter(refused.values()))
    for name in refused:
        opened[name] = backends.open_one(name, replace(options, kernels=AUTO))


def _meant(backends: Backends, item: str, devices: Sequence[Device]) -> list[str]:
    """The devices that a word of `--backend` stands for."""
    ids = [device.id for device in devices]
    if item in ids:
        return [item]
    if ":" in item:
        has = f"backend {backend_of(item)!r} has: {', '.join(ids)}"
        lack = backends.lack(backend_of(item))
        hint = f"{has}{f', {lack}' if lack else ''}; `prima doctor` tells what others would need"
        raise PluginError(f"there is no device {item!r}", hint=hint)
    return [device.id for device in devices if not is_cpu(device.id)] or ids[:1]


# ---------------------------------------------------------------- the best


def _open_best(backends: Backends, options: BackendOptions, model: ModelSpec | None) -> tuple[DeviceSet, str]:
    opened: dict[str, Opened] = {}
    left_out: dict[str, PrimaError] = {}
    spare = [name for name in backends.backend_names if backends.is_cpu_only(name)]
    first = [name for name in backends.backend_names if name not in spare]
    _open_usable(backends, first, options, opened, left_out)
    if not any(is_cpu(device.id) for one in opened.values() for device in one.devices):
        _open_usable(backends, spare, options, opened, left_out)
    if not opened:
        raise _nothing_usable(left_out)
    candidates = [device for one in opened.values() for device in one.devices]
    ids, chooser = backends.opinion(candidates, model) or (choose_devices(candidates), "")
    used = set(map(backend_of, ids))
    _close_all(backends, {name: one for name, one in opened.items() if name not in used})
    chosen = _device_set({name: one for name, one in opened.items() if name in used}, ids)
    others = [device.id for device in candidates if device.id not in ids]
    others += [name for name in spare if name not in {*opened, *left_out}]
    lacks = {name: backends.lack(name) for name in backends.backend_names}
    lacks |= {name: lacks[name] or error.message for name, error in left_out.items()}
    return chosen, _explanation(ids, chooser, others, lacks)


def _open_usable(
    backends: Backends,
    names: Iterable[str],
    options: BackendOptions,
    opened: dict[str, Opened],
    left_out: dict[str, PrimaError],
) -> None:
    for name in names:
        try:
            opened[name] = backends.open_one(name, options)
        except PrimaError as error:
            if backends.stops_at_faults or backends.is_set_wrongly(name):
                _close_all(backends, opened)
                raise
            left_out[name] = error


def _nothing_usable(left_out: Mapping[str, PrimaError]) -> PrimaError:
    for error in left_out.values():
        if isinstance(error, ConfigError):
            return error
    why = "; ".join(error.message for error in left_out.values())
    return PluginError(f"no backend can be used: {why or 'none is installed'}", hint="`prima plugins` shows why")


def _explanation(ids: Sequence[str], chooser: str, others: Sequence[str], lacks: Mapping[str, str]) -> str:
    """What is used, and why not the rest: `lacks` by backend; how to get what is missing is for `prima doctor`."""
    parts = [f"computing on {', '.join(ids)}" + (f", chosen by {chooser}" if chooser else "")]
    if others:
        why = "" if chooser else " (may be the same hardware; --backend can name them)"
        parts.append(f"not on {', '.join(others)}{why}")
    parts += _lacking(lacks)
    return "; ".join(parts)


def _lacking(lacks: Mapping[str, str]) -> list[str]:
    return [f"{name}: {lack}" for name, lack in lacks.items() if lack]


def _device_set(opened: Mapping[str, Opened], ids: Sequence[str]) -> DeviceSet:
    return DeviceSet({name: one.backend for name, one in opened.items()}, ids)


def _close_all(backends: Backends, opened: Mapping[str, Opened]) -> None:
    for name, one in opened.items():
        backends.close_one(name, one.backend)
