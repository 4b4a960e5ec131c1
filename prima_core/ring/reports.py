"""What a node's owner thread is given, and what it tells: plain data between `ring/worker.py` and who runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prima_core.engine.engine import StepResult
from prima_core.errors import PrimaError
from prima_core.model.weights import Model
from prima_core.plan.plan import Plan
from prima_core.ring.wire import Epoch, WirePolicy


@dataclass(frozen=True, slots=True)
class Assignment:
    """A node's part in an epoch. `addresses` are the data addresses of the plan's nodes; `find_model` is called in the
    owner thread, because reading files may take a while."""

    epoch: Epoch
    plan: Plan
    find_model: Callable[[], Model]
    wire: WirePolicy
    addresses: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of a load, in bytes of weights."""

    epoch: Epoch
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The assignment is loaded and its links are dialled: steps of this epoch may come."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The assignment could not be loaded, or its weights cannot be read any more while it is served.

    `device`: where memory did not suffice, if that is why; it has `memory_bytes` now that all was given back."""

    epoch: Epoch
    error: PrimaError
    device: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of a step, on the node that runs the output part."""

    epoch: Epoch
    result: StepResult


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The next node of the plan takes no frames of this one."""

    epoch: Epoch
    node: str
    error: PrimaError


Report = Loading | Ready | LoadFailed | Collected | Unreachable
