"""Strangers' code that does not come to an end: it is told with the line where it hangs, and left behind."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from prima_core.testing.report import Recorder, Wrong

T = TypeVar("T")

_LOOK_S = 0.05


def within(limit_s: float, work: Callable[[], T], hint: str = "") -> T:
    """The result of `work`, which runs in a thread of its own, or what it raises. Raises Wrong when it hangs."""
    thread, result = _started(work, "prima-check")
    wait([result], limit_s)
    if not result.done():
        raise hanging(thread, limit_s, hint)
    return result.result()


def watched(recorder: Recorder, suite: Callable[[], T], limit_s: float, hint: str = "") -> T | None:
    """The result of `suite`, which runs all checks of `recorder` in one thread, or what it raises.

    None: a check has hung, and the thread with it; the recorder has it as failed.
    """
    thread, result = _started(suite, "prima-owner")
    while not wait([result], _LOOK_S).done:
        if recorder.running_s() > limit_s:
            recorder.give_up(hanging(thread, limit_s, hint))
            return None
    return result.result()


def hanging(thread: threading.Thread, limit_s: float, hint: str) -> Wrong:
    return Wrong(f"an end within {limit_s:g} s", f"it hangs: {''.join(_innermost(thread))}", hint)


def _started(work: Callable[[], T], name: str) -> tuple[threading.Thread, Future[T]]:
    """Not by an executor: the interpreter would wait at its end for what hangs."""
    result: Future[T] = Future()

    def main() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again by who waits, SystemExit too
            result.set_exception(error)

    thread = threading.Thread(target=main, name=name, daemon=True)
    thread.start()
    return thread, result


def _innermost(thread: threading.Thread) -> Iterator[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is not None:
        last = traceback.extract_stack(frame)[-1]
        yield f"{last.filename}:{last.lineno} {last.line}"
