"""`prima serve` and `prima join`: the two long-running commands."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from prima_core.commands.setup import (
    LoadProgress,
    Settings,
    check_transport,
    head_options,
    head_secret,
    model_path,
    node_name,
    node_options,
    open_model_argument,
    say,
    token_path,
    worker_secret,
)
from prima_core.errors import ClusterError, ConfigError
from prima_core.events import ServerReady
from prima_core.library.folder import models_folder
from prima_core.node.driver import State, Status
from prima_core.node.head import Head
from prima_core.node.join import JoinOptions, WorkerNode
from prima_core.node.local import leave_when_stdin_closes
from prima_core.node.network import (
    advertised,
    cluster_address,
    host_of,
    is_network,
    own_address_towards,
    with_port,
)
from prima_core.plan.plan import Plan
from prima_core.plan.words import left_out, summary
from prima_core.plugins import Registry
from prima_core.serve.app import Service, make_app
from prima_core.serve.connections import HttpProtocol
from prima_core.serve.guard import Guard

log = logging.getLogger(__name__)

GRACE_S = 1  # for answers to be written out after Ctrl-C
EXPLAIN_S = 1.0  # that what is told of a plan waits for who was left out; requests do not
MOST_VISITS = 8  # that are listed one by one


def serve(model: str | None, settings: Settings, registry: Registry) -> None:
    """Serve until Ctrl-C. Raises PrimaError when it cannot."""
    host, port = settings["host"], settings["port"]
    guard = Guard(host, settings["api_key"])
    check_transport(settings, registry)
    with ExitStack() as exits:
        listener = exits.enter_context(bound(host, port))
        opened = exits.enter_context(open_model_argument(model, settings))
        options = head_options(settings, opened.file.metadata)
        head = exits.enter_context(Head(opened, options, registry, head_secret(settings), say))
        if head.node.explanation:
            say(head.node.explanation)
        if settings["listen"] is not None:
            say(f"other machines join with: prima join {head.join_address}\nand {_token_place(settings)}")
        server = make_server(head, guard, head.stop_requests)
        watch = Watch(head, server, registry, url_of(listener), may_wait=settings["listen"] is not None)
        with _ended_by_signals(server):
            watch.start()
            server.run(sockets=[listener])
    watch.raise_error()


def make_server(service: Service, guard: Guard, on_stop: Callable[[], None]) -> Server:
    """The HTTP server, to be run with a bound socket."""
    config = uvicorn.Config(
        make_app(service, guard),
        http=HttpProtocol,
        lifespan="off",
        log_config=None,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return Server(config, on_stop)


class Server(uvicorn.Server):
    """uvicorn that tells, at the first signal, so that running answers can end and need not be waited for."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self.was_signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.was_signalled = True
        self._on_stop()
        super().handle_exit(sig, frame)


def _token_place(settings: Settings) -> str:
    """Where the token is that `setup.head_secret` took."""
    if settings["token_file"] is not None:
        return f"the token in {settings['token_file']}"
    return "the token in PRIMA_TOKEN" if os.environ.get("PRIMA_TOKEN") else f"the token in {token_path()}"


class Watch:
    """Tells the user how the head gets ready, and ends the server when it never can."""

    def __init__(self, head: Head, server: uvicorn.Server, registry: Registry, url: str, may_wait: bool) -> None:
        self._head = head
        self._server = server
        self._registry = registry
        self._url = url
        self._may_wait = may_wait
        self._error: ClusterError | None = None
        self._thread = threading.Thread(target=self._main, name="prima-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        say(f"loading {self._head.model_name} ...")
        while True:
            try:
                with LoadProgress() as progress:
                    self._head.wait_until_serving(progress.show)
            except ClusterError as error:
                if self._head.driver.status.state is State.STOPPED:
                    return
                if not self._may_wait:
                    self._error = error
                    self._server.should_exit = True
                    return
                say(f"waiting for more nodes: {error}")
                _wait_for_change(self._head)
                continue
            self._announce(self._head.driver.status)
            return

    def _announce(self, status: Status) -> None:
        plan = status.plan and self._head.explainer.explained(status.plan, EXPLAIN_S)
        for line in describe_plan(plan):
            say(line)
        say(f"serving {self._head.model_name} at {self._url}/v1 (OpenAI-compatible), Ctrl-C ends")
        self._registry.emit(ServerReady(self._url, self._head.model_name))


def _wait_for_change(head: Head) -> None:
    before = head.driver.status
    while head.driver.status is before:
        threading.Event().wait(0.1)


def describe_plan(plan: Plan | None) -> Iterator[str]:
    """A line per visit and device, where there is more than one node or device; and in words what lines do not say."""
    if plan is None:
        return
    is_short = len(plan.visits) <= MOST_VISITS
    for visit in plan.visits if is_short and len(plan.residency) > 1 else ():
        for part in visit.parts(""):
            device = f" ({part.device})" if part.device else ""
            yield f"  layers {part.start:>3} to {part.stop - 1:>3} on {visit.node}{device}"
    if not is_short or left_out(plan) or any(need.buffer_bytes for need in plan.residency):
        yield f"  {summary(plan)}"


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """The HTTP socket, open before anything is loaded, so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: without that every answer takes 40 ms more.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        if sys.platform != "win32":  # there it would let two servers have the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # two servers could bind the same port; and who comes early waits
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot serve on {host}:{port}: {why}", hint="another --port or --host may be free"
            ) from error
        yield listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _ended_by_signals(server: Server) -> Iterator[None]:
    """Signals end the server in order, also while uvicorn does not listen to them yet, or not any more.

    Ctrl-C is how a server ends: it is no error.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, server.handle_exit) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.was_signalled:
        say("stopped")


# ---------------------------------------------------------------- prima join


def join(head: str, until_stdin_closes: bool, settings: Settings, registry: Registry) -> None:
    """Compute for a head until Ctrl-C. Raises PrimaError when that cannot work."""
    address = cluster_address(head)
    tell = log.info if until_stdin_closes else say  # of a local node its head tells enough
    is_own = not until_stdin_closes  # a local one is as its head
    options = replace(_join_options(address, settings), measures=is_own, remembers=is_own)
    worker = WorkerNode(options, registry, worker_secret(settings), tell)
    signal.signal(signal.SIGTERM, lambda sig, frame: worker.stop())
    signal.signal(signal.SIGINT, lambda sig, frame: worker.stop())
    if until_stdin_closes:
        leave_when_stdin_closes(worker.stop)
    else:
        say(f"joining {address}, Ctrl-C leaves")
    worker.run()


def _join_options(address: str, settings: Settings) -> JoinOptions:
    advertise = settings["advertise"]
    return JoinOptions(
        head=address,
        listen=_own_listen(address, settings["listen"]),
        name=settings["name"] or node_name(),
        places=model_places(settings),
        advertise=lambda bound: advertised(bound, advertise),
        node=node_options(settings),
    )


def _own_listen(head: str, listen: str | None) -> str:
    """Where this node takes frames: what the user said, else any port of the interface that leads to the head."""
    if listen is not None:
        return listen if "://" in listen else cluster_address(listen)
    if not is_network(head):
        return with_port(head, 0)
    own = own_address_towards(host_of(head))
    return f"{head.partition('://')[0]}://{f'[{own}]' if ':' in own else own}:0"


def model_places(settings: Settings) -> tuple[Path, ...]:
    """Where to look for the model: the user's file and folder of models, and the built-in model."""
    with model_path(None) as builtin:
        given = [Path(place) for place in (settings["model_file"], settings["models"]) if place is not None]
    for place in given:
        if not place.exists():
            raise ConfigError(f"{place} does not exist", hint="check --model and --models")
    pulled = [] if settings["models"] is not None else [models_folder(None)]
    return (*given, *(folder for folder in pulled if folder.is_dir()), builtin)
