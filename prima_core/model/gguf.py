"""A model's GGUF file, or its parts, mapped read-only: metadata, tensor table, views of the weights without a copy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model import split
from prima_core.model.header import StringArray, TensorInfo, Value, printable
from prima_core.model.part import Part
from prima_core.model.quant import unsupported_type

__all__ = ["GGUFFile", "StringArray", "TensorInfo", "Value"]


class GGUFFile:
    """An open model. `tensors` and `metadata` stay readable after `close`; so do views that are still held.

    `path` is that of the first part, `size` the bytes of all, `metadata` those of the first.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0]
        self.parts = tuple(parts)
        self.path = first.path
        self.size = sum(part.size for part in parts)
        self.metadata: Mapping[str, Value] = first.header.metadata
        self.tensors: Mapping[str, TensorInfo] = first.header.tensors
        if len(parts) > 1:
            self.tensors = MappingProxyType(split.join_tables(parts))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map the file and check its whole header; of a split model all parts, whichever is named.

        Raises ModelError: no such file, not GGUF, another version, damaged, a part missing; `field` names the culprit.
        """
        with ExitStack() as on_error:
            named = Part.open(Path(path))
            on_error.callback(named.close)
            file = cls(_with_the_others(named, on_error))
            on_error.pop_all()
        return file

    def view(self, name: str) -> Weight:
        """A tensor as it lies in the map. Raises ModelError when it is absent or of a type that is not supported."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError("there is no such tensor in the file", field=printable(name))
        if info.type is None:
            raise unsupported_type(printable(name), info.type_name)
        return Weight(info.name, info.type, info.shape, self.parts[info.part].data(info))

    def check_unchanged(self) -> None:
        """Raise ModelError when a file at its path is not the one that was opened, or was written to since."""
        for part in self.parts:
            part.check_unchanged()

    def close(self) -> None:
        """Give the files back; a map itself goes with the last view of it. Idempotent."""
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _with_the_others(named: Part, on_error: ExitStack) -> list[Part]:
    """All parts of the model that `named` belongs to, in order."""
    n_parts = split.part_count(named)
    if n_parts == 1:
        return [named]
    parts = []
    for number, path in enumerate(split.paths_of(named, n_parts), 1):
        part = named if number == split.part_number(named.path) else split.open_part(path)
        on_error.callback(part.close)
        parts.append(part)
        split.check_part(parts)
    return parts
