"""What became of the checks of a plugin: a frozen report, and one readable error for all that failed.

A check is a function that returns figures (or nothing), raises `Wrong` for a fault, or `NotOffered` where the plugin
may do without. Any other exception is a fault too: a plugin raises errors of prima's only.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from prima_core.errors import PrimaError

Figures = Mapping[str, float | int | str]


class State(StrEnum):
    OK = "ok"
    NOT_OFFERED = "not offered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """What became of one check. The last three are of a failed one; `reason` of what is not offered."""

    name: str
    state: State
    figures: Figures = field(default_factory=dict, hash=False)
    reason: str = ""
    expected: str = ""
    came: str = ""
    hint: str = ""

    def __str__(self) -> str:
        """Of a failed check: what an author needs to know, in a few lines."""
        lines = [self.name, f"  expected: {self.expected}", f"  came:     {self.came}"]
        return "\n".join([*lines, f"  hint:     {self.hint}"] if self.hint else lines)


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of `subject`, in order. `str()` is a table."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state is State.FAILED)

    def __str__(self) -> str:
        counts = ", ".join(f"{self._count(state)} {state}" for state in State)
        width = max((len(check.name) for check in self.checks), default=0)
        rows = [f"  {check.name:<{width}}  {check.state:<11}  {_told(check)}".rstrip() for check in self.checks]
        return "\n".join([f"{self.subject}: {counts}", *rows])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def demand(self) -> Report:
        """This report. Raises CheckFailed when a check failed."""
        if self.failures:
            raise CheckFailed(self)
        return self

    def _count(self, state: State) -> int:
        return sum(check.state is state for check in self.checks)


class CheckFailed(AssertionError):
    """Checks failed: `failures` are they, `report` is about all."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.failures = report.failures
        count = f"{len(self.failures)} of {len(report.checks)} checks failed"
        super().__init__("\n".join([f"{report.subject}: {count}", *map(str, self.failures)]))


class Wrong(Exception):
    """Raised by a check: the plugin did something else than it should have. `hint` is for its author."""

    def __init__(self, expected: str, came: str, hint: str = "") -> None:
        super().__init__(f"expected {expected}, came {came}")
        self.expected, self.came, self.hint = expected, came, hint


class NotOffered(Exception):
    """Raised by a check: the plugin says that it does not do this, which it may."""


def expect(holds: bool, expected: str, came: object, hint: str = "") -> None:
    """Raise `Wrong` unless it holds."""
    if not holds:
        raise Wrong(expected, str(came), hint)


def expect_refusal(kind: type[PrimaError], what: str, call: Callable[[], object]) -> PrimaError:
    """The error that `call` raises. Raises `Wrong` when it raises none, or one of another kind."""
    try:
        result = call()
    except kind as error:
        return error
    except Exception as error:
        raise Wrong(f"{kind.__name__} for {what}", _told_error(error), "raise the documented class of error") from error
    raise Wrong(f"{kind.__name__} for {what}", f"no error, but {_short(result)}", "refuse it before anything changes")


class Recorder:
    """Runs the checks of one subject and keeps what became of each."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self._running: tuple[str, float] | None = None  # and since when

    def run(self, name: str, check: Callable[[], Figures | None]) -> bool:
        """Whether the check passed."""
        self._running = name, time.monotonic()
        self.checks.append(_outcome(name, check))
        self._running = None
        return self.checks[-1].state is State.OK

    def running_s(self) -> float:
        """How long the present check has been running. From any thread."""
        running = self._running
        return time.monotonic() - running[1] if running else 0.0

    def give_up(self, wrong: Wrong) -> None:
        """The present check will not come to an end."""
        name = self._running[0] if self._running else ""
        self.checks.append(_failed(name, wrong))

    def report(self, subject: str) -> Report:
        return Report(subject, tuple(self.checks))


def _outcome(name: str, check: Callable[[], Figures | None]) -> Check:
    try:
        return Check(name, State.OK, check() or {})
    except Wrong as wrong:
        return _failed(name, wrong)
    except NotOffered as reason:
        return Check(name, State.NOT_OFFERED, reason=str(reason))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the border to a stranger's code: what it raises is the answer
        return Check(name, State.FAILED, expected="no error", came=_told_error(error))


def _failed(name: str, wrong: Wrong) -> Check:
    return Check(name, State.FAILED, expected=wrong.expected, came=wrong.came, hint=wrong.hint)


def _told_error(error: BaseException) -> str:
    """The error and where it was raised."""
    [*_, frame] = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def _short(result: object) -> str:
    text = repr(result)
    return f"{text[:60]} ..." if len(text) > 64 else text


def _told(check: Check) -> str:
    if check.state is State.OK:
        return ", ".join(f"{name} {_number(value)}" for name, value in check.figures.items())
    return check.reason or f"expected {check.expected}; came {check.came}".replace("\n", " ")


def _number(value: float | int | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
