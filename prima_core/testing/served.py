"""`prima serve` as a process of its own, asked as its users ask it.

with Served([str(model), "--memory", "1GB"]) as node:
    node.answer("hello", 16)
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from threading import Thread
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from prima_core.testing.pressure import MemoryGroup

ANSWER_WITHIN_S = 60.0


class Served:
    """The server answers when this returns. `log`: the lines that it has written so far. `prima`: how Python is told to
    run it.

    Raises EOFError with these lines when it ends before.
    """

    def __init__(
        self, arguments: Sequence[str], group: MemoryGroup | None = None, prima: Sequence[str] = ("-m", "prima_core")
    ) -> None:
        command = [sys.executable, *prima, "serve", *arguments, "--port", "0"]
        popen = subprocess.Popen if group is None else group.popen
        self.process: subprocess.Popen[bytes] = popen(command, stderr=subprocess.PIPE)
        self.log: list[str] = []
        self._address = self._read_address()
        self._reader = Thread(target=self._read_log, name="served-log", daemon=True)
        self._reader.start()

    def answer(self, prompt: str, n_tokens: int) -> str:
        """The text of so many tokens, the likeliest ones."""
        wanted = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        return str(self._ask("POST", "/v1/completions", wanted)["choices"][0]["text"])

    def times(self) -> dict[str, float]:
        """`NodeTimes` of the only node."""
        [node] = self._ask("GET", "/nodes")["nodes"]
        return dict(node["times"])

    def close(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _ask(self, method: str, path: str, body: object = None) -> Any:  # Any: JSON
        with closing(http.client.HTTPConnection(self._address, timeout=ANSWER_WITHIN_S)) as connection:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                text = answer.read()
        if answer.status != http.client.OK:
            raise OSError(f"the server answered {answer.status}: {text.decode()}")
        return json.loads(text)

    def _read_address(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.decode())
            if line.startswith(b"serving "):
                return urlsplit(line.decode().split(" at ")[-1].split(" ")[0]).netloc
        raise EOFError("".join(self.log))

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
