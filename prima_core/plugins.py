"""The registry: loads each plugin alone, hands out what they offer, and remembers what went wrong with whom.

A taken name, an old API number, an unknown hook or an exception is the fault of one plugin (`border.py`) and hurts no
other. `prima plugins` shows them all.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

from prima_core import hookspecs
from prima_core.border import Border, Entry, Fault, Offer, OfferT, Stage, kind_of, label_of, name_of
from prima_core.devices import AUTO, Opened, open_devices
from prima_core.entrypoints import Source, find_sources
from prima_core.errors import ConfigError, PluginError
from prima_core.interfaces import (
    API,
    MAX_GROWTH,
    Backend,
    BackendOptions,
    BackendPlugin,
    Device,
    Probe,
    SolverPlugin,
    Transport,
    TransportPlugin,
)

if TYPE_CHECKING:
    import click

    from prima_core.events import Event
    from prima_core.model.spec import ModelSpec


class PluginState(StrEnum):
    OK = "ok"
    UNUSABLE = "unusable"
    FAULT = "fault"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class PluginRow:
    """One line of `prima plugins`; plain data, ready for JSON. `offers` are kind and name, e.g. `backend numpy`.

    `fault` holds the faults, or why a backend is not usable here, or what keeps it from its best. `facts`: what a
    backend that lacks nothing says of itself.
    """

    name: str
    distribution: str
    version: str
    state: PluginState
    offers: tuple[str, ...] = ()
    facts: str = ""
    fault: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """`PRIMA_PLUGINS` and its kin. Names are those of entry points or of distributions; `allow` None: all."""

    allow: frozenset[str] | None = None
    disable: frozenset[str] = frozenset()
    strict: bool = False
    trace: bool = False

    def wants(self, source: Source) -> bool:
        names = {source.name, source.distribution}
        return (self.allow is None or bool(names & self.allow)) and not names & self.disable

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> PluginSettings:
        """Raises ConfigError for a switch that is neither on nor off."""
        return cls(
            allow=_names(environ.get("PRIMA_PLUGINS", "")) or None,
            disable=_names(environ.get("PRIMA_DISABLE_PLUGINS", "")),
            strict=_switch(environ, "PRIMA_STRICT_PLUGINS"),
            trace=_switch(environ, "PRIMA_TRACE_PLUGINS"),
        )


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class Registry:
    """All plugins of this process. Make one with `load` at the edge and pass it on; there is no global one.

    Hands out only what is right in form: the right type, our API, a free name. Once loaded, any thread may use it.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self._settings = settings
        self._border = Border(strict=settings.strict, trace=settings.trace)
        self._entries: list[Entry] = []
        self._by_plugin: dict[int, Entry] = {}  # by id() of the registered object: a plugin may be unhashable
        self._backends: dict[str, BackendPlugin] = {}
        self._transports: dict[str, TransportPlugin] = {}
        self._solvers: dict[str, SolverPlugin] = {}
        self._open_transports: dict[str, tuple[Entry, Transport]] = {}
        self._lock = threading.Lock()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Registry:
        """Find and load the installed plugins.

        Raises ConfigError when `PRIMA_PLUGINS` names one that is not installed, and PluginError for the first fault
        under `PRIMA_STRICT_PLUGINS`.
        """
        registry = cls(PluginSettings.read(environ))
        sources = find_sources()
        registry._refuse_unknown_names(sources)
        for source in sources:
            registry._enter(source)
        return registry

    # ------------------------------------------------------------ what is there

    def backend(self, name: str) -> BackendPlugin:
        """Raises PluginError, with the names there are, for an unknown one. Its `probe` never raises; `open` raises
        PluginError for a foreign exception and lets errors of ours pass."""
        return self._get("backend", self._backends, name)

    def solver(self, name: str) -> SolverPlugin:
        """Raises PluginError for an unknown name. Its `solve` raises PlanError, or PluginError when it is broken."""
        return self._get("solver", self._solvers, name)

    def transport(self, address: str) -> Transport:
        """The transport for the scheme of `address`: one object per scheme, opened at first use, closed by `close`.

        Raises PluginError for an unknown scheme or a transport that cannot be opened.
        """
        scheme, mark, _ = address.partition("://")
        if not mark:
            schemes = ", ".join(f"{scheme}://" for scheme in self._transports)
            raise PluginError(f"{address!r} is not an address", hint=f"an address starts with one of: {schemes}")
        offer = self._get("transport", self._transports, scheme)
        with self._lock:
            if scheme not in self._open_transports:
                self._open_transports[scheme] = self._owner(offer), offer.open()
            return self._open_transports[scheme][1]

    def open_backend(self, choice: str, options: BackendOptions, model: ModelSpec | None = None) -> tuple[Backend, str]:
        """Open the devices that `choice` means as one backend; also a line that explains them. The caller closes it.

        `choice`: `auto`, or a comma list, in order of preference, of backends (their accelerators, or their CPU where
        they have none) and devices by id. Raises PluginError when a named one, or for `auto` every one, is unknown, not
        usable or broken, and ConfigError for what is no such list.
        """
        return open_devices(self, choice, options, model)

    @property
    def backend_names(self) -> Sequence[str]:
        return tuple(self._backends)

    def is_cpu_only(self, name: str) -> bool:
        """Whether `auto` can do without this backend, as its probe says."""
        probe = self.backend(name).probe()
        return probe.usable and probe.cpu_only

    def is_set_wrongly(self, name: str) -> bool:
        """Whether the user asked it for what cannot be, as its probe says."""
        return self.backend(name).probe().wrong_setting

    def lack(self, name: str) -> str:
        """Why a backend is not usable, or what keeps it from its best, as its probe says; empty: nothing."""
        return _lack(self.backend(name).probe())

    def open_one(self, name: str, options: BackendOptions) -> Opened:
        """A backend with all of its devices; raises as `open_backend`. The caller closes it, by `close_one`."""
        offer = self.backend(name)
        probe = offer.probe()
        if not probe.usable:
            raise PluginError(f"backend {name!r} is not usable: {probe.reason}", hint=probe.hint)
        backend = offer.open(options)
        try:
            label, entry = label_of(offer), self._owner(offer)
            devices = self._border.demand(entry, Stage.OPEN, label, backend.devices, partial(_wrong_devices, name))
            if not devices:
                raise PluginError(f"backend {name!r} has no device here", hint="another --backend may have one")
        except BaseException:
            self.close_one(name, backend)
            raise
        return Opened(backend, devices)

    def close_one(self, name: str, backend: Backend) -> None:
        """A backend that fails at it is recorded."""
        self._border.attempt(self._owner(self._backends[name]), Stage.CLOSE, backend.close)

    def opinion(self, candidates: Sequence[Device], model: ModelSpec | None) -> tuple[Sequence[str], str] | None:
        """What the first plugin with a valid one would use of these devices, and which plugin that is."""
        ids = {device.id for device in candidates}
        for entry, call in self._calls("prima_choose_backend", candidates=tuple(candidates), model=model):
            order = self._border.attempt(entry, Stage.CHOOSE, call)
            if order is None:
                continue
            if isinstance(order, (tuple, list)) and order and all(isinstance(d, str) and d in ids for d in order):
                return tuple(dict.fromkeys(order)), entry.source.id
            self._border.record(entry, Stage.CHOOSE, f"{order!r} are not devices of: {', '.join(sorted(ids))}")
        return None

    def report(self) -> list[PluginRow]:
        """A row for every entry point, in loading order. Probes the backends, which may import heavy things."""
        return [_row(entry) for entry in self._entries]

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(fault for entry in self._entries for fault in entry.faults)

    @property
    def stops_at_faults(self) -> bool:
        return self._border.strict and bool(self.faults)

    # ------------------------------------------------------------ the other hooks

    def emit(self, event: Event) -> None:
        """Tell every listener. One that raises is recorded once and hurts nobody."""
        for entry, call in self._calls("prima_on_event", event=event):
            self._border.attempt(entry, Stage.EVENT, call)

    def add_commands(self, cli: click.Group) -> None:
        """Let plugins add commands. A name that is taken stays as it was."""
        for entry, call in self._calls("prima_add_commands", cli=cli):
            before = dict(cli.commands)
            self._border.attempt(entry, Stage.COMMANDS, call)
            for name, command in before.items():
                if cli.commands.get(name) is not command:
                    cli.commands[name] = command
                    self._border.record(entry, Stage.COMMANDS, f"the command {name!r} is taken")

    def close(self) -> None:
        """Close the opened transports. Idempotent."""
        with self._lock:
            opened, self._open_transports = self._open_transports, {}
        for entry, transport in opened.values():
            if isinstance(transport, _Closable):
                self._border.attempt(entry, Stage.CLOSE, transport.close)

    # ------------------------------------------------------------ loading

    def _refuse_unknown_names(self, sources: Sequence[Source]) -> None:
        known = {name for source in sources for name in (source.name, source.distribution)}
        for name in sorted((self._settings.allow or frozenset()) - known):
            raise ConfigError(f"PRIMA_PLUGINS names {name!r}, which is not installed", hint=_did_you_mean(name, known))

    def _enter(self, source: Source) -> None:
        entry = Entry(source, disabled=not self._settings.wants(source))
        self._entries.append(entry)
        if entry.disabled:
            return
        if source.point is None:
            hint = f"reinstall or remove {source.distribution}"
            self._border.record(entry, Stage.METADATA, "its entry_points.txt cannot be read", hint=hint)
            return
        plugin = self._border.attempt(entry, Stage.IMPORT, source.point.load)
        if not entry.faults and self._register(entry, plugin):
            self._ask(entry, "prima_backends", BackendPlugin, self._backends)
            self._ask(entry, "prima_transports", TransportPlugin, self._transports)
            self._ask(entry, "prima_solvers", SolverPlugin, self._solvers)
        self._border.trace("plugin %s %s offers: %s", source.id, source.version, ", ".join(map(label_of, entry.offers)))

    def _register(self, entry: Entry, plugin: object) -> bool:
        """Register with pluggy. After a fault nothing of this entry point stays, and nothing of another has gone."""
        if id(plugin) in self._by_plugin:
            taken_by = self._by_plugin[id(plugin)].source.id
            self._border.record(entry, Stage.HOOKS, f"its plugin object is already registered by {taken_by}")
            return False
        self._border.attempt(entry, Stage.HOOKS, lambda: self._manager.register(plugin, name=entry.source.id))
        if not entry.faults:
            self._check_hooks(entry, plugin)
        if entry.faults:
            self._manager.unregister(name=entry.source.id)
            return False
        self._by_plugin[id(plugin)] = entry
        return True

    def _check_hooks(self, entry: Entry, plugin: object) -> None:
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            self._border.record(entry, Stage.HOOKS, "it implements no hook", hint="mark its hooks with @hookimpl")
        for caller in callers:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and not caller.has_spec() and not impl.optionalhook:
                    hint = f"it was made for another version of prima; the hooks here: {', '.join(_hook_names())}"
                    self._border.record(entry, Stage.HOOKS, f"unknown hook {caller.name!r}", hint=hint)
                elif impl.plugin is plugin and (impl.wrapper or impl.hookwrapper):
                    # Plugins are asked one by one, so a wrapper would wrap nobody.
                    self._border.record(
                        entry, Stage.HOOKS, f"{caller.name!r} is a hook wrapper", hint="return data instead"
                    )

    def _ask(self, entry: Entry, hook: str, kind: type[OfferT], table: dict[str, OfferT]) -> None:
        for owner, call in self._calls(hook):
            if owner is entry:
                for offer in self._border.attempt(entry, Stage.OFFER, partial(_exhaust, call)) or ():
                    self._accept(entry, hook, offer, kind, table)

    def _accept(self, entry: Entry, hook: str, offer: object, kind: type[OfferT], table: dict[str, OfferT]) -> None:
        if not isinstance(offer, kind):
            self._border.record(entry, Stage.OFFER, f"{hook} gave a {type(offer).__name__}, not a {kind.__name__}")
            return
        label, name = label_of(offer), name_of(offer)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9._+-]*", name) or name == AUTO:
            self._border.record(
                entry, Stage.OFFER, f"{label}: not a name that can be used", hint="lower case, e.g. 'greedy'"
            )
        elif offer.api != API:
            hint = f"install a version of {entry.source.distribution} that was made for this version of prima"
            self._border.record(
                entry, Stage.OFFER, f"{label} speaks API {offer.api}, this prima speaks API {API}", hint=hint
            )
        elif name in table:
            self._border.record(
                entry, Stage.OFFER, f"{label}: the name is taken by {self._owner(table[name]).source.id}"
            )
        else:
            table[name] = self._border.guard(entry, offer)
            entry.offers.append(table[name])

    # ------------------------------------------------------------ calling plugins

    def _calls(self, hook: str, **arguments: object) -> Iterator[tuple[Entry, Callable[[], Any]]]:
        """The implementations of a hook, one by one, in pluggy's calling order, bound to the arguments they take.

        Any: what a stranger's hook returns is known only after a check.
        """
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            taken = [arguments[name] for name in impl.argnames]
            yield self._by_plugin[id(impl.plugin)], partial(impl.function, *taken)

    # ------------------------------------------------------------ looking up

    def _get(self, kind: str, table: Mapping[str, OfferT], name: str) -> OfferT:
        if name in table:
            return table[name]
        for entry in self._entries:
            if entry.source.name == name and (entry.faults or entry.disabled):
                reason = "; ".join(map(str, entry.faults)) or "it is disabled"
                hint = entry.faults[0].hint if entry.faults else "see PRIMA_PLUGINS and PRIMA_DISABLE_PLUGINS"
                raise PluginError(f"there is no {kind} {name!r}: plugin {entry.source.id}: {reason}", hint=hint)
        raise PluginError(f"there is no {kind} {name!r}", hint=_did_you_mean(name, table))

    def _owner(self, offer: Offer) -> Entry:
        return next(entry for entry in self._entries for own in entry.offers if own is offer)


def _wrong_devices(backend: str, devices: object) -> str:
    """What is wrong with what `devices()` gave, in a sentence; empty: nothing."""
    if not isinstance(devices, Sequence) or not all(isinstance(device, Device) for device in devices):
        return "devices() gave something else than Devices"
    ids = [device.id for device in devices]
    strange = [id_ for id_ in ids if not (id_.startswith(f"{backend}:") and id_.isprintable() and len(id_) <= 128)]
    if strange:
        return f"devices are named backend:device, not {', '.join(map(repr, strange))}"
    if len(set(ids)) < len(ids):
        return f"every device has an id of its own, not {', '.join(ids)}"
    sizes = [device.memory_bytes for device in devices]
    if not all(isinstance(size, int) and 0 <= size < 1 << 63 for size in sizes):
        return f"memory_bytes are bytes, a whole number from 0 on, not {', '.join(map(repr, sizes))}"
    factors = [factor for device in devices for factor in device.growth.values() if not 1 <= factor <= MAX_GROWTH]
    return f"growth is from 1 to {MAX_GROWTH:g}, not {', '.join(map(str, factors))}" if factors else ""


def _row(entry: Entry) -> PluginRow:
    probes = [offer.probe() for offer in entry.offers if isinstance(offer, BackendPlugin)]
    lacking = [probe for probe in probes if _lack(probe)]
    return PluginRow(
        name=entry.source.name,
        distribution=entry.source.distribution,
        version=entry.source.version,
        state=_state(entry, probes),
        offers=tuple(f"{kind_of(offer)} {name_of(offer)}" for offer in entry.offers),
        facts="; ".join(probe.reason for probe in probes if probe.reason and not _lack(probe)),
        fault="; ".join([str(fault) for fault in entry.faults] or [probe.reason for probe in lacking]),
        hint="; ".join(dict.fromkeys(one.hint for one in (entry.faults or lacking) if one.hint)),
    )


def _lack(probe: Probe) -> str:
    return probe.reason if probe.hint or not probe.usable else ""


def _state(entry: Entry, probes: Sequence[Probe]) -> PluginState:
    if entry.disabled:
        return PluginState.DISABLED
    if entry.faults:
        return PluginState.FAULT
    if any(not probe.usable for probe in probes):
        return PluginState.UNUSABLE
    return PluginState.OK


def _exhaust(call: Callable[[], Iterable[object]]) -> tuple[object, ...]:
    return tuple(call())


def _hook_names() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("prima_")]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    there = f"there are: {', '.join(names) or 'none'}"
    return f"did you mean {close[0]!r}? {there}" if close else there


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _switch(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "no", "off", "false"):
        return False
    if value in ("1", "yes", "on", "true"):
        return True
    raise ConfigError(f"{name} is {environ[name]!r}", hint="use 1 or 0")
