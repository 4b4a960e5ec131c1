"""A cluster file: the machines of an emulated home as figures. Pure data, checked."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from prima_core.cage.amounts import CORES, DISK_RATE, LINK_RATE, SIZE, Kind, parse
from prima_core.errors import ConfigError

MAX_NODES = 64
PLACEHOLDERS = frozenset(
    ("model", "name", "rank", "world", "address", "head", "next", "peers", "threads", "memory", "prompt", "gen")
)
PLACEHOLDER = re.compile(r"\{([a-z]+)\}")

Name = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9-]{0,30}\Z")]  # of a namespace and a control group too
Text = Annotated[str, Meta(max_length=4096)]
Share = str | Annotated[float, Meta(ge=0)]


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One emulated machine; docs/bench-cluster.md explains every field."""

    name: Name
    memory: Share
    vram: Share = 0
    base: Share = 0
    cores: Share | None = None
    period_ms: Annotated[float, Meta(ge=1, le=1000)] = 10
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    disk: str | None = None
    link: str | None = None
    delay_ms: Annotated[float, Meta(ge=0, le=10_000)] = 0
    options: tuple[Text, ...] = ()
    command: tuple[Text, ...] = ()
    ready: Text = ""
    copy: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("memory", SIZE), ("vram", SIZE), ("base", SIZE), ("cores", CORES), *_RATES):
            _check_amount(name, getattr(self, name), kind)
        _check_pattern("ready", self.ready)
        unknown = [name for part in self.command for name in PLACEHOLDER.findall(part) if name not in PLACEHOLDERS]
        if unknown:
            raise ValueError(f"command: {{{unknown[0]}}} is not known, there are {', '.join(sorted(PLACEHOLDERS))}")
        if self.command and self.options:
            raise ValueError("options are prima's: with a command of your own write them there")


_RATES = (("disk", DISK_RATE), ("link", LINK_RATE))


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the speed of other systems is read: over an API like OpenAI's, or from what the head's command prints."""

    url: Annotated[str, Meta(pattern=r"\A(http://127\.0\.0\.1(:\d{1,5})?(/[!-~]*)?)?\Z")] = ""
    begin: Text = ""
    tokens_per_s: Text = ""
    ms_per_token: Text = ""

    def __post_init__(self) -> None:
        _check_pattern("begin", self.begin)
        for name in ("tokens_per_s", "ms_per_token"):
            pattern = getattr(self, name)
            _check_pattern(name, pattern)
            if pattern and re.compile(pattern).groups != 1:
                raise ValueError(f"{name} has one group, that of the number")
        if sum(map(bool, (self.url, self.tokens_per_s, self.ms_per_token))) > 1:
            raise ValueError("url, tokens_per_s and ms_per_token exclude each other")


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first node is the head."""

    name: Name
    about: Text = ""
    nodes: Annotated[tuple[Node, ...], Meta(min_length=1, max_length=MAX_NODES)]
    measure: Measure = msgspec.field(default_factory=Measure)

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two nodes are called {twice!r}")
        if self.nodes[0].command and not (self.measure.url or self.measure.tokens_per_s or self.measure.ms_per_token):
            raise ValueError(
                "the head has a command of its own: say in [measure] how its speed is read, by url,"
                " tokens_per_s or ms_per_token"
            )
        if not self.nodes[0].command and self.measure != Measure():
            raise ValueError("[measure] is for a head with a command of its own")


def _check_amount(name: str, text: str | float | None, kind: Kind) -> None:
    if text is None:
        return
    try:
        parse(text, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


# ---------------------------------------------------------------- files


def shipped() -> tuple[str, ...]:
    """Names of the clusters that come with prima."""
    folder = files("prima_core.cage") / "clusters"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def load_cluster(name: str) -> Cluster:
    """A cluster that comes with prima, by its name, or a TOML file. Raises ConfigError that names the culprit."""
    if name in shipped():
        return parse_cluster((files("prima_core.cage") / "clusters" / f"{name}.toml").read_text("utf-8"), name)
    try:
        return parse_cluster(Path(name).read_text("utf-8"), name)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read the cluster {name}: {why}",
            hint=f"name a TOML file, or one that comes with prima: {', '.join(shipped())}",
        ) from error


def parse_cluster(text: str, source: str = "the cluster") -> Cluster:
    """Raises ConfigError for what is no cluster."""
    try:
        return msgspec.convert(_with_defaults(tomllib.loads(text)), Cluster)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}", hint="docs/bench-cluster.md explains every field") from error


def _with_defaults(table: dict[str, Any]) -> dict[str, Any]:  # Any: TOML
    """`[defaults]` holds for every node that does not say otherwise."""
    defaults, nodes = table.get("defaults", {}), table.get("nodes")
    if not isinstance(defaults, dict) or not isinstance(nodes, list):
        return table  # its check tells
    filled = [{**defaults, **node} if isinstance(node, dict) else node for node in nodes]
    return {**{name: value for name, value in table.items() if name != "defaults"}, "nodes": filled}
