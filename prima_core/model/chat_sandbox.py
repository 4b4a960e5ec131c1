"""What chat templates can use: jinja2's immutable sandbox with what transformers adds. For the worker process only."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class RefusedError(Exception):
    """The template called raise_exception."""


def environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals.update(raise_exception=_refuse, strftime_now=_now, dict=_dict, namespace=_SafeNamespace)
    del env.globals["lipsum"]
    return env


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model said, for training. Here it only groups."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """Names with an underscore in front lead into Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # Any, and no self: `namespace(self=1)` is allowed, as in jinja2
        if any(name.startswith("_") for name in dict(*args[1:], **kwargs)):
            raise jinja2.exceptions.SecurityError("a namespace must not have names that begin with an underscore")
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace must not have the name {name!r}")
        super().__setitem__(name, value)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own would write <, > and & as escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:  # Any: as dict itself; the class would offer its attributes
    return dict(*args, **kwargs)
