"""The border to plugins: every call into a stranger's code goes through here, and what goes wrong is kept.

`attempt` records a failure and the rest goes on; `demand` records it and raises `PluginError`, because the plugin was
asked for. `guard` wraps an offer so that whoever uses it need not know.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from prima_core.entrypoints import Source
from prima_core.errors import PluginError, PrimaError
from prima_core.interfaces import (
    Backend,
    BackendOptions,
    BackendPlugin,
    Probe,
    SolverPlugin,
    Transport,
    TransportPlugin,
)

if TYPE_CHECKING:
    from prima_core.plan.plan import Plan
    from prima_core.plan.problem import Problem

logger = logging.getLogger("prima_core.plugins")

T = TypeVar("T")
Offer = BackendPlugin | TransportPlugin | SolverPlugin
OfferT = TypeVar("OfferT", BackendPlugin, TransportPlugin, SolverPlugin)


class Stage(StrEnum):
    """Where a plugin failed."""

    METADATA = "metadata"
    IMPORT = "import"
    HOOKS = "hooks"
    OFFER = "offer"
    PROBE = "probe"
    OPEN = "open"
    SOLVE = "solve"
    CHOOSE = "choose"
    EVENT = "event"
    COMMANDS = "commands"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Fault:
    """What a plugin did wrong; `error` is a sentence, `hint` what to do about it."""

    plugin: str
    distribution: str
    stage: Stage
    error: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {self.error}"


@dataclass(slots=True, eq=False)
class Entry:
    """One entry point and what became of it."""

    source: Source
    disabled: bool = False
    offers: list[Offer] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def knows(self, fault: Fault) -> bool:
        """Whether it need not be kept: the same again, or another failure of a listener that is called for ever."""
        return fault in self.faults or any(known.stage == fault.stage == Stage.EVENT for known in self.faults)


class Border:
    """Calls into plugins. `strict`: a fault is an error; `trace`: more is logged, tracebacks of faults too."""

    def __init__(self, *, strict: bool, trace: bool) -> None:
        self.strict = strict
        self._trace = trace
        if trace:
            logger.setLevel(logging.INFO)  # asked for, whatever level the program logs at
        self._probes: dict[str, Probe] = {}

    def attempt(self, entry: Entry, stage: Stage, call: Callable[[], T]) -> T | None:
        """The result of `call`, or None after a fault was recorded."""
        try:
            return call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  also SystemExit and the panics of Rust modules; recorded
            self.record(entry, stage, _sentence(error), cause=error)
            return None

    def demand(self, entry: Entry, stage: Stage, label: str, call: Callable[[], T], complaint: Callable[[T], str]) -> T:
        """The result of `call`, or PluginError. An error of ours is the plugin's considered answer and passes."""
        cause: BaseException | None = None
        try:
            result = call()
            wrong = complaint(result)
        except (KeyboardInterrupt, PrimaError):
            raise
        except BaseException as error:  # noqa: BLE001  as above
            wrong, cause = _sentence(error), error
        if not wrong:
            return result
        fault = self.record(entry, stage, wrong, cause=cause)
        raise PluginError(f"{label} failed at {stage}: {wrong}", hint=fault.hint) from cause

    def record(
        self, entry: Entry, stage: Stage, error: str, *, hint: str = "", cause: BaseException | None = None
    ) -> Fault:
        """Keep and log a fault, the first time; raises PluginError when strict."""
        source = entry.source
        hint = hint or f"PRIMA_TRACE_PLUGINS=1 tells more, PRIMA_DISABLE_PLUGINS={source.name} turns it off"
        fault = Fault(source.name, source.distribution, stage, error, hint)
        if not entry.knows(fault):
            entry.faults.append(fault)
            logger.warning("plugin %s: %s (%s)", source.id, fault, hint)
            self.trace("plugin %s: %s", source.id, fault, cause=cause)
        if self.strict:
            raise PluginError(f"plugin {source.id}: {fault}", hint=hint) from cause
        return fault

    def trace(self, message: str, *values: object, cause: BaseException | None = None) -> None:
        if self._trace:
            logger.info(message, *values, exc_info=cause)

    # ------------------------------------------------------------ offers, with every call into the plugin wrapped

    def guard(self, entry: Entry, offer: OfferT) -> OfferT:
        """The same offer with its functions wrapped: `probe` never raises, the others raise errors of ours only."""
        if isinstance(offer, BackendPlugin):
            return replace(offer, probe=partial(self._probe, entry, offer), open=partial(self._open, entry, offer))
        if isinstance(offer, TransportPlugin):
            return replace(offer, open=partial(self._open_transport, entry, offer))
        return replace(offer, solve=partial(self._solve, entry, offer))

    def _probe(self, entry: Entry, offer: BackendPlugin) -> Probe:
        """What the plugin answers, asked once; that its probe fails is an answer too."""
        if offer.name not in self._probes:
            broken = Probe(usable=False, reason="its probe failed", hint="`prima plugins` shows how")
            self._probes[offer.name] = self.attempt(entry, Stage.PROBE, partial(_ask_probe, offer)) or broken
        return self._probes[offer.name]

    def _open(self, entry: Entry, offer: BackendPlugin, options: BackendOptions) -> Backend:
        return self.demand(entry, Stage.OPEN, label_of(offer), partial(offer.open, options), has_methods_of(Backend))

    def _open_transport(self, entry: Entry, offer: TransportPlugin) -> Transport:
        return self.demand(entry, Stage.OPEN, label_of(offer), offer.open, has_methods_of(Transport))

    def _solve(self, entry: Entry, offer: SolverPlugin, problem: Problem) -> Plan:
        from prima_core.plan.plan import Plan  # not at the top: loading plugins stays light

        return self.demand(entry, Stage.SOLVE, label_of(offer), partial(offer.solve, problem), is_a(Plan))


def _ask_probe(offer: BackendPlugin) -> Probe:
    answer = offer.probe()
    if wrong := is_a(Probe)(answer):
        raise PluginError(wrong)
    return answer


def kind_of(offer: Offer) -> str:
    return type(offer).__name__.removesuffix("Plugin").lower()


def name_of(offer: Offer) -> str:
    return offer.scheme if isinstance(offer, TransportPlugin) else offer.name


def label_of(offer: Offer) -> str:
    return f"{kind_of(offer)} {name_of(offer)!r}"


def is_a(kind: type) -> Callable[[object], str]:
    """As `has_methods_of`, for a class."""
    return lambda result: (
        "" if isinstance(result, kind) else f"it gave a {type(result).__name__}, not a {kind.__name__}"
    )


def has_methods_of(protocol: type) -> Callable[[object], str]:
    """What is wrong with an object that should follow `protocol`, in a sentence; empty: nothing."""
    names = [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]

    def complaint(result: object) -> str:
        missing = [name for name in names if not callable(getattr(result, name, None))]
        kind = f"a {type(result).__name__}, which is no {protocol.__name__}"
        return f"it gave {kind}: {', '.join(missing)} missing" if missing else ""

    return complaint


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, PrimaError) else f"{type(error).__name__}: {error}"
