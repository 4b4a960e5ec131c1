"""JSON bodies to structs: what the body asks for and is not there is an error that names it. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from prima_core.errors import RequestError

Neutral = Mapping[str, tuple[object, ...]]
"""Fields that this version does not act on, with the values, besides null, that ask for nothing."""

LABELS = ("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user")
"""Fields that ask for nothing that could show in an answer; any value is taken."""

B = TypeVar("B", bound=msgspec.Struct)


def fields_of(data: bytes) -> dict[str, Any]:  # Any: looked at field by field
    """The fields of a body but for `LABELS`, each decoded alone, so that an error can name it."""
    raw = _decoded(data, dict[str, msgspec.Raw])
    return {name: _decoded(value, Any, name) for name, value in raw.items() if name not in LABELS}


def _decoded(data: bytes | msgspec.Raw, kind: Any, name: str | None = None) -> Any:  # Any: as msgspec's own signature
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "the body is not a JSON object" if name is None else f"{name!r} cannot be read"
        raise RequestError(f"{what}: {error}", param=name) from error


def to_struct(fields: Mapping[str, Any], kind: type[B]) -> B:  # Any: JSON
    """The fields as a struct. Raises RequestError naming the field that is missing, unknown or wrong."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), param=_culprit(str(error))) from error


def _culprit(message: str) -> str | None:
    """The field that msgspec complains about: "... unknown field `foo`", "... - at `$.foo[0]`", or both. Of a mapping
    it does not tell the key: "... - at `$.foo[...]`", "... - at `key` in `$.foo`"."""
    path = re.search(r" - at (?:`key` in )?`\$\.?(.*)`$", message)
    name = re.search(r"(?:unknown|required) field `(.*?)`(?: - at |$)", message)
    found = [match[1] for match in (path, name) if match and match[1]]
    return ".".join(found).removesuffix("[...]") or None


def without_neutral(fields: Any, table: Neutral, path: str = "") -> Any:  # Any: JSON of any kind, so far
    """The fields that `table` does not name. Raises RequestError for one that it names and that asks for something."""
    if not isinstance(fields, dict):
        return fields
    for name in table.keys() & fields.keys():
        _check_neutral(fields[name], table[name], path + name)
    return {name: value for name, value in fields.items() if name not in table}


def _check_neutral(value: object, neutral: tuple[object, ...], name: str) -> None:
    if value is None or any(type(value) is type(other) and value == other for other in neutral):
        return
    raise unsupported(name)


def unsupported(name: str) -> RequestError:
    return RequestError(
        f"{name!r} is not supported by this version of prima",
        param=name,
        code="unsupported_parameter",
        hint=f"leave {name!r} out",
    )
