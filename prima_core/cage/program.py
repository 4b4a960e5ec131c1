"""A program that runs in a node's cage, and the lines that it prints."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prima_core.cage.groups import Group
from prima_core.errors import ClusterError

MAX_LINES = 2000
SHOWN_LINES = 12
REAP_WITHIN_S = 5.0
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
_LOOK_S = 0.2


def entering(group: Group, namespace: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in a group and a network namespace.

    `nsenter`, not `ip netns exec`: that would hide /sys/fs/cgroup, where a node sees its limits.
    """
    network = ["nsenter", f"--net={namespace}"]
    return ["sh", "-c", _ENTER, "sh", *map(str, group.entrances), "--", *network, *command]


class Program:
    """Started at once. A thread reads what it prints, both streams as one, until it ends."""

    def __init__(
        self, name: str, group: Group, namespace: Path, command: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self._group = group
        self._command = command
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._has_ended = False
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            entering(group, namespace, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(env),
            start_new_session=True,  # Ctrl-C is the bench's
        )
        self._reader = threading.Thread(target=self._read, name=f"prima-cage-{name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def wait_for(self, pattern: str, until_s: float, check: Callable[[], None] = lambda: None) -> re.Match[str]:
        """The first line that matches. Raises ClusterError when none comes: the program ended, or `until_s` came; and
        what `check` raises, which is called now and then."""
        with self._changed:
            while True:
                match = next(filter(None, (re.search(pattern, line) for line in self._lines)), None)
                if match is not None:
                    return match
                if self._has_ended:
                    raise self.ended()
                if time.monotonic() > until_s:
                    raise ClusterError(
                        f"node {self.name} did not print {pattern!r} in time", hint=f"its last lines:\n{self.tail()}"
                    )
                check()
                self._changed.wait(_LOOK_S)

    def check_alive(self) -> None:
        """Raises ClusterError when it has ended."""
        if self._process.poll() is not None:
            raise self.ended()

    def ended(self) -> ClusterError:
        """Why a program that should run does not."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        if self._group.killed():
            why = "was killed because its memory was full"
        else:
            why = f"has ended with exit code {self._process.returncode}"
        return ClusterError(
            f"node {self.name} {why}", hint=f"it ran `{' '.join(self._command)}`; its last lines:\n{self.tail()}"
        )

    def tail(self) -> str:
        return "\n".join(f"    {line}" for line in list(self._lines)[-SHOWN_LINES:])

    def reap(self) -> None:
        """Once it has been killed with all that it started."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_WITHIN_S)
        self._reader.join(REAP_WITHIN_S)
