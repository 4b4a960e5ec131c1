"""Notices that the files of a served model change: what is computed from them then is worth nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prima_core.errors import ModelError
from prima_core.model.weights import Model

CHECK_FILES_EVERY_S = 2.0


class FileWatch:
    """Looks every few seconds, in a thread of its own, and calls `changed` there, once at most."""

    def __init__(self, model: Model, changed: Callable[[ModelError], None]) -> None:
        self._model = model
        self._changed = changed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prima-file-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _main(self) -> None:
        while not self._stopping.wait(CHECK_FILES_EVERY_S):
            try:
                self._model.check_unchanged()
            except ModelError as error:
                self._changed(error)
                return
