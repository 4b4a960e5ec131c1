"""Real heads behind real sockets, and clients of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import openai

from prima_core.arch.families import open_model
from prima_core.commands.serve import bound, make_server, url_of
from prima_core.commands.setup import model_path
from prima_core.engine.request import Event, Failed, Finished, FinishReason, Request
from prima_core.node.head import Head, HeadOptions
from prima_core.plugins import Registry
from prima_core.ring.security import new_secret
from prima_core.serve.app import Service
from prima_core.serve.guard import Guard

H = TypeVar("H", bound=Head)


class Watched(Head):
    """A head that remembers how its answers ended."""

    def __init__(self, *arguments: Any) -> None:  # Any: those of a Head
        super().__init__(*arguments)
        self.ends: SimpleQueue[FinishReason | str] = SimpleQueue()

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        def watch(event: Event) -> None:
            deliver(event)
            if isinstance(event, Finished):
                self.ends.put(event.reason)
            elif isinstance(event, Failed):
                self.ends.put(event.error.message)

        return super().submit(request, watch)

    @property
    def load(self) -> tuple[object, object]:
        """How many requests run and wait."""
        facts = self.health()[1]
        return facts["running"], facts["waiting"]

    def forget_ends(self) -> None:
        until(lambda: self.load == (0, 0))
        while not self.ends.empty():
            self.ends.get()


class Tireless(Watched):
    """A head whose answers end only where they were asked to end."""

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        return super().submit(replace(request, ignore_eos=True), deliver)


@contextmanager
def started(kind: type[H], model: Path | None, options: HeadOptions) -> Iterator[H]:
    """A head with this model, or the built-in one."""
    with ExitStack() as exits:
        registry = Registry.load(os.environ)
        exits.callback(registry.close)
        path = model or exits.enter_context(model_path(None))
        opened = exits.enter_context(open_model(path))
        head = kind(opened, options, registry, new_secret())
        exits.enter_context(head)
        yield head


@contextmanager
def serving(service: Service, guard: Guard | None = None) -> Iterator[str]:
    """The URL at which the service is served."""
    with bound("127.0.0.1", 0) as listener:
        server = make_server(service, guard or Guard("127.0.0.1"), lambda: None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join(10)


def client_at(url: str, key: str = "none", strict: bool = False) -> openai.OpenAI:
    """`strict`: an answer that is not exactly what OpenAI's would be is an error."""
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30, _strict_response_validation=strict
    )


def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come about")
        threading.Event().wait(0.01)
