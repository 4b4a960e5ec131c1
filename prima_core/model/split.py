"""Models in several files, `NAME-00001-of-0000N.gguf`, as llama.cpp's `llama-gguf-split` makes them.

The metadata stand in the first part; every part has a tensor table and weights of its own, and three numbers:
`split.no` (from 0), `split.count`, and `split.tensors.count` (of all parts together).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TypeVar

from prima_core.errors import ModelError
from prima_core.model.header import TensorInfo, Value, printable
from prima_core.model.part import Part

AnyPath = TypeVar("AnyPath", bound=PurePath)

NO, COUNT, TENSORS_COUNT = "split.no", "split.count", "split.tensors.count"

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_OTHER_MODEL = "the parts are not of one model: fetch all of them again, from one place"


def part_number(path: PurePath) -> int:
    """The number of a part by its name, from 1; 0 for the name of a whole model."""
    return _read_name(path)[1]


def count_by_name(path: PurePath) -> int:
    """How many parts a model has by the name of any one; 1 for the name of a whole model."""
    return _read_name(path)[2]


def all_parts(path: AnyPath) -> tuple[AnyPath, ...]:
    """The paths of all parts of a model, in order, by the name of any one; the path alone where it is no part's."""
    name, number, n_parts = _read_name(path)
    if not number:
        return (path,)
    return tuple(path.with_name(f"{name}-{number:05}-of-{n_parts:05}.gguf") for number in range(1, n_parts + 1))


def model_name(path: PurePath) -> str:
    """What to call a model whose file, or a part of it, lies there."""
    return _read_name(path)[0]


def _read_name(path: PurePath) -> tuple[str, int, int]:
    """`X-00002-of-00003.gguf` -> X, 2, 3; `X.gguf` -> X, 0, 1."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return path.name.removesuffix(".gguf"), 0, 1
    return match[1], int(match[2]), int(match[3])


def part_count(part: Part) -> int:
    """How many files the model has that this one belongs to. Raises ModelError for a number that cannot be."""
    return 1 if COUNT not in part.header.metadata else max(1, _number(part, COUNT))


def paths_of(part: Part, n_parts: int) -> tuple[Path, ...]:
    """Where the parts of the model lie that `part` is of. Raises ModelError naming those that are missing."""
    paths = all_parts(part.path)
    if not part_number(part.path):
        raise ModelError(
            f"{part.path} is one of {n_parts} parts, which its name does not tell",
            field=COUNT,
            hint=f"name the parts NAME-00001-of-{n_parts:05}.gguf and so on",
        )
    if len(paths) != n_parts:
        raise ModelError(f"{part.path.name} says that there are {n_parts} parts", field=COUNT, hint=_OTHER_MODEL)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{len(missing)} of the {n_parts} parts of the model are missing: {', '.join(missing[:3])}{more}",
            field="file",
            hint=f"put them beside {part.path.name}",
        )
    return paths


def open_part(path: Path) -> Part:
    """A part other than the one that the user named: errors tell which it is."""
    try:
        return Part.open(path)
    except ModelError as error:
        what = error.message.removeprefix(f"{error.field}: ")
        raise ModelError(f"{what} (in {path.name})", field=error.field, hint=error.hint) from error


def join_tables(parts: Sequence[Part]) -> Mapping[str, TensorInfo]:
    """The tensors of all parts. Raises ModelError where the parts are not those of one model in this order."""
    expected = _number(parts[0], TENSORS_COUNT)
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        for name, tensor in part.header.tensors.items():
            if name in tensors:
                other = parts[tensors[name].part].path.name
                raise ModelError(f"is in {other} and in {part.path.name}", field=printable(name), hint=_OTHER_MODEL)
            tensors[name] = replace(tensor, part=index)
    if len(tensors) != expected:
        raise ModelError(
            f"says {expected}, the parts have {len(tensors)} together", field=TENSORS_COUNT, hint=_OTHER_MODEL
        )
    return tensors


def check_part(parts: Sequence[Part]) -> None:
    """Whether the last of the parts opened so far is the next of its model, before others take memory too.

    Raises ModelError.
    """
    index, first, part = len(parts) - 1, parts[0], parts[-1]
    n_parts = part_count(first)
    for key, expected in ((NO, index), (COUNT, n_parts), (TENSORS_COUNT, _number(first, TENSORS_COUNT))):
        found = _number(part, key)
        if found != expected:
            raise ModelError(f"is {found} in {part.path.name}, not {expected}", field=key, hint=_OTHER_MODEL)
    key = "general.architecture"
    ours, its = first.header.metadata.get(key), part.header.metadata.get(key)
    if its is not None and (not isinstance(its, str) or its != ours):
        raise ModelError(f"is {its!r:.80} in {part.path.name}, not {ours!r:.80}", field=key, hint=_OTHER_MODEL)


def _number(part: Part, key: str) -> int:
    value: Value | None = part.header.metadata.get(key)
    if value is None:
        raise ModelError(f"is not in {part.path.name}", field=key, hint=_OTHER_MODEL)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelError(f"is {value!r:.80} in {part.path.name}, not a number", field=key, hint=_OTHER_MODEL)
    return value
