"""What a node says when weights cannot be read any more, which ends its process: their file was cut short, or the disk
that the map is of failed (SIGBUS)."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType

from prima_core.errors import ModelError
from prima_core.model.weights import Model

log = logging.getLogger(__name__)

WEIGHTS_LOST = 74
"""Exit code; EX_IOERR of sysexits.h."""

LINGER_S = 0.5
"""For what was told to leave this process; with the telling within the two seconds that the handler waits."""


def meaning_of(exit_code: int) -> str:
    """What a node's exit code says, where it has a meaning of its own."""
    return (
        ": it could not read its weights any more: was the model's file changed?" if exit_code == WEIGHTS_LOST else ""
    )


class LastWords:
    """`tell` is called once at most, in a thread of its own that then calls `leave`, to clean up, and ends the process
    with code WEIGHTS_LOST.

    They have about a second. Where the native module is missing, and in Windows, nothing of this happens: there SIGBUS
    ends a process without a word.
    """

    def __init__(self, tell: Callable[[ModelError], None], leave: Callable[[], None]) -> None:
        self._tell, self._leave = tell, leave
        self._native = _native()
        self._watched: dict[int, Model] = {}
        self._receive, self._send = -1, -1
        self._thread = threading.Thread(target=self._main, name="prima-last-words", daemon=True)

    def start(self) -> None:
        if self._native is not None:
            self._receive, self._send = os.pipe()
            self._thread.start()

    def watch(self, model: Model) -> None:
        """From now on a model's maps are watched, until `close`, which must come before the model's."""
        if self._native is None:
            return
        for part in model.file.parts:
            place = self._native.watch(*part.addresses, self._send, WEIGHTS_LOST)
            if place >= 0:  # else a thousand are watched: this one will go without a word
                self._watched[place] = model

    def close(self) -> None:
        """Idempotent."""
        if self._native is None or self._send < 0:
            return
        while self._watched:
            self._native.forget(self._watched.popitem()[0])
        os.close(self._send)
        self._thread.join()
        os.close(self._receive)
        self._send = -1

    def _main(self) -> None:
        word = os.read(self._receive, 4)
        if word:
            self._end(self._watched[int.from_bytes(word, sys.byteorder)])

    def _end(self, model: Model) -> None:
        try:
            error = _cause(model)
            log.critical("this process ends: %s", error)
            self._tell(error)
            threading.Event().wait(LINGER_S)
            self._leave()
        finally:
            os._exit(WEIGHTS_LOST)


def _cause(model: Model) -> ModelError:
    try:
        model.check_unchanged()
    except ModelError as error:
        return error
    return ModelError(f"the weights in {model.path} cannot be read", field="file", hint="does its disk still work?")


def _native() -> ModuleType | None:
    try:
        from prima_core import _lastwords
    except ImportError:
        return None
    return _lastwords
