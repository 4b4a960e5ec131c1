"""The six hooks of prima. A plugin is a module (or object) that implements some of them, marked with `hookimpl`,
behind an entry point of the group `prima`:

    [project.entry-points.prima]
    greedy = "my_package.plugin"

Hooks hand out descriptors (see `interfaces.py`) and are never called in the token loop. A plugin module imports nothing
heavy: it is imported at every start of prima. Arguments that a hook does not need may be left out of its signature.
A plugin whose hook is not in this file was made for another prima and is not used, unless the hook is marked
`@hookimpl(optionalhook=True)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from prima_core.events import Event
    from prima_core.interfaces import BackendPlugin, Device, SolverPlugin, TransportPlugin
    from prima_core.model.spec import ModelSpec

PROJECT = "prima"
"""Name of the entry point group and of the markers."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def prima_backends() -> Iterable[BackendPlugin]:  # type: ignore[empty-body]  # a specification has no body
    """Offer backends: what computes a slice of a model on a device.

    Asked once per process, alone in its own `try`. `probe` says whether the backend would work on this machine and what
    to install; `open` gives the `Backend`. Both may import heavy things, this function may not.
    """


@hookspec
def prima_transports() -> Iterable[TransportPlugin]:  # type: ignore[empty-body]  # a specification has no body
    """Offer transports: what moves messages between nodes. One descriptor per address scheme, e.g. `tcp` for `tcp://`.

    `open` gives the `Transport`; it is opened at most once per process and scheme, at the first address of the scheme.
    """


@hookspec
def prima_solvers() -> Iterable[SolverPlugin]:  # type: ignore[empty-body]  # a specification has no body
    """Offer solvers: pure functions from a `Problem` to a `Plan`, chosen by `--solver NAME`.

    No I/O, no clock, the same answer twice. Raise `PlanError` when nothing fits. Core checks every plan, also ours.
    """


@hookspec(firstresult=True)
def prima_choose_backend(candidates: Sequence[Device], model: ModelSpec | None) -> Sequence[str] | None:
    """Choose for `--backend auto`: ids of those `candidates` that shall compute, best first, or None for "no opinion".

    `candidates` are the devices of all usable backends (but of those with nothing but a CPU, where another has one);
    `model` is None where it is not known yet. The first device is filled with layers first, the others get what does
    not fit. Of two backends that mean the same GPU, name one. The first plugin with an opinion wins; core's own choice
    comes last: the accelerators of one backend, then numpy's CPU.
    """


@hookspec
def prima_on_event(event: Event) -> None:
    """Be told what happened (`events.py`). Return quickly: it runs on the thread where it happened, which may be any.

    An exception is recorded as the plugin's fault, once, and hurts nobody.
    """


@hookspec
def prima_add_commands(cli: click.Group) -> None:
    """Add commands to `prima`: `cli.add_command(...)`. A name that is taken is refused. Import click inside."""
