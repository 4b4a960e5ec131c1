"""From the settings of a command line to the objects that commands work with."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import rich_click as click
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from prima_core.arch.families import open_model
from prima_core.config import CLUSTER_PORT, SETTINGS
from prima_core.engine.engine import MAX_WAITING
from prima_core.engine.request import Sampling
from prima_core.errors import ConfigError
from prima_core.interfaces import Goal, KvType
from prima_core.library.folder import find_model, models_folder
from prima_core.model.visible import visible
from prima_core.model.vocabulary import DEFAULT_TEMPLATE
from prima_core.model.weights import Model
from prima_core.node.driver import State, Status
from prima_core.node.head import Head, HeadOptions
from prima_core.node.network import cluster_address
from prima_core.node.node import NodeOptions, parse_bytes
from prima_core.plan.plan import Plan, plan_from_json
from prima_core.plan.problem import PROMPT_TOKENS
from prima_core.plugins import Registry
from prima_core.ring.security import find_secret, load_or_create_token, new_secret
from prima_core.ring.wire import WirePolicy

Settings = Mapping[str, Any]  # values of `config.TABLE` by name, each as its click type made it

log = logging.getLogger(__name__)
console = Console(stderr=True, highlight=False)
BUILTIN = "prima-builtin.gguf"
DEFAULT_SAMPLING = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)


@contextmanager
def model_path(model: str | None, models: str | None = None) -> Iterator[Path]:
    """The file that MODEL means, a path or a name in the folder `models`; the built-in model where it is absent."""
    if model is not None:
        yield find_model(model, models_folder(models))
        return
    with as_file(files("prima_core.builtin") / BUILTIN) as path:
        yield path


def set_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def token_path() -> Path:
    """Where a head keeps the cluster's token."""
    return Path(click.get_app_dir("prima")) / "token"


def head_secret(settings: Settings) -> bytes:
    """The cluster's secret; one that lives as long as this process where no other machine can join."""
    given = find_secret(os.environ.get("PRIMA_TOKEN"), _path(settings.get("token_file")))
    if given is not None:
        return given
    return new_secret() if settings.get("listen") is None else load_or_create_token(token_path())


def worker_secret(settings: Settings) -> bytes:
    """The secret that this machine was given. Raises ConfigError where there is none."""
    secret = find_secret(os.environ.get("PRIMA_TOKEN"), _path(settings.get("token_file")), token_path())
    if secret is None:
        raise ConfigError(
            "this machine has no cluster token",
            hint=f"copy the head's token file to {token_path()}, or set PRIMA_TOKEN to its text",
        )
    return secret


def node_options(settings: Settings, n_sharing: int = 1) -> NodeOptions:
    """What a node may use; `n_sharing` nodes of one machine share its memory.

    Each may use all cores: while one computes a token the others wait for it, and what waits gives its cores away.
    """
    memory = settings.get("memory")
    return NodeOptions(
        backend=settings["backend"],
        threads=settings.get("threads", 0),
        kernels=settings["kernels"],
        memory_bytes=None if memory is None else parse_bytes(memory),
        n_sharing=n_sharing,
    )


def head_options(settings: Settings, metadata: Mapping[str, object]) -> HeadOptions:
    n_nodes = settings.get("nodes", 1)
    return HeadOptions(
        node=node_options(settings, n_nodes),
        name=settings.get("name") or node_name(),
        listen=_listen(settings),
        advertise=settings.get("advertise"),
        n_local=n_nodes - 1,
        wait=settings.get("wait", 1),
        solver=settings.get("solver", "halda"),
        goal=Goal(settings.get("goal", Goal.LATENCY)),
        n_prompt=settings.get("n_prompt", PROMPT_TOKENS),
        plan=plan_of_file(settings.get("plan")),
        rounds=settings.get("rounds") or 0,
        context=settings.get("context"),
        kv_type=KvType(settings["kv_type"]) if settings.get("kv_type") else None,
        context_shift=settings.get("context_shift", False),
        parallel=settings.get("parallel", 1),
        queue=settings.get("queue", MAX_WAITING),
        chunk=settings.get("chunk"),
        wire=WirePolicy(settings.get("wire", "auto")),
        sampling=sampling(settings, metadata),
        chat_template=settings.get("chat_template", DEFAULT_TEMPLATE),
        log_level=settings["log_level"],
    )


def _listen(settings: Settings) -> str | None:
    """Where nodes join: what the user said, else where only local ones can, else nowhere."""
    listen, n_nodes, wait = settings.get("listen"), settings.get("nodes", 1), settings.get("wait", 1)
    if listen is not None:
        return cluster_address(listen)
    if wait > n_nodes:
        raise ConfigError(
            f"--wait {wait} is more than the nodes that are started here ({n_nodes}), and no others can join",
            hint=f"let them join with --listen 0.0.0.0:{CLUSTER_PORT}, or start them here with --nodes {wait}",
        )
    return _local_address(settings.get("transport", "inproc")) if n_nodes > 1 else None


def _local_address(transport: str) -> str:
    if transport in ("tcp", "tls+tcp"):
        return f"{transport}://127.0.0.1:0"
    return f"{transport}://"


def node_name() -> str:
    return socket.gethostname().split(".")[0] or "node"


def sampling(settings: Settings, metadata: Mapping[str, object]) -> Sampling:
    """What the user set, else what the model's file recommends (`general.sampling.*`), else llama.cpp's defaults."""

    def choose(name: str, key: str, lowest: float, highest: float, default: float) -> float:
        chosen = settings.get(name)
        if chosen is not None:
            return float(chosen)
        recommended = metadata.get(f"general.sampling.{key}", default)
        if isinstance(recommended, (int, float)) and lowest <= recommended <= highest:
            return float(recommended)
        log.warning("the model recommends a %s of %.80r, %g is used instead", key, recommended, default)
        return default

    default = DEFAULT_SAMPLING
    return Sampling(
        temperature=choose("temp", "temp", 0, 100, default.temperature),
        top_k=int(choose("top_k", "top_k", 0, 2**31 - 1, default.top_k)),
        top_p=choose("top_p", "top_p", 0, 1, default.top_p),
        min_p=choose("min_p", "min_p", 0, 1, default.min_p),
        repetition_penalty=choose("repeat_penalty", "penalty_repeat", 0.01, 100, default.repetition_penalty),
        frequency_penalty=settings.get("frequency_penalty", default.frequency_penalty),
        presence_penalty=settings.get("presence_penalty", default.presence_penalty),
    )


def plan_of_file(path: str | None) -> Plan | None:
    """Without its certificate, which may be for another question."""
    if path is None:
        return None
    try:
        return replace(plan_from_json(Path(path).read_bytes()), certificate=None)
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}", hint="check --plan") from error


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


@contextmanager
def open_model_argument(model: str | None, settings: Settings) -> Iterator[Model]:
    with model_path(model, settings["models"]) as path, open_model(path) as opened:
        yield opened


@contextmanager
def serving_head(model: str | None, settings: Settings, registry: Registry) -> Iterator[Head]:
    """A head that serves the model, for commands that use it in their own process; ends with the block."""
    check_transport(settings, registry)
    with open_model_argument(model, settings) as opened:
        options = head_options(settings, opened.file.metadata)
        with Head(opened, options, registry, head_secret(settings), say) as head:
            with LoadProgress() as progress:
                head.wait_until_serving(progress.show)
            yield head


def check_transport(settings: Settings, registry: Registry) -> None:
    """Raises PluginError for a transport that was asked for and is not there, also where a single node needs none."""
    if settings["transport"] != SETTINGS["transport"].default:
        registry.transport(_local_address(settings["transport"]))


def say(line: str) -> None:
    console.print(visible(line), markup=False, soft_wrap=True)


class LoadProgress:
    """A bar per node while weights are loaded; nothing where standard error is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}  # rich's TaskID

    def __enter__(self) -> LoadProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, status: Status) -> None:
        if status.state is not State.LOADING:
            return
        for name, share in status.progress.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(f"loading on {name}", total=1.0)
            self._progress.update(self._tasks[name], completed=share)
