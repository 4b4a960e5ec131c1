"""What a model of the folder is, from its header alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from prima_core.arch.families import read_spec
from prima_core.errors import ModelError
from prima_core.library.folder import Entry
from prima_core.model.gguf import GGUFFile


@dataclass(frozen=True, slots=True)
class Description:
    """`types`: which share of the weights is of which tensor type. `fault`: why it cannot be served, if it cannot.

    What is not known of a broken model is None. `modified_s` is a Unix time.
    """

    name: str
    path: str
    n_bytes: int
    modified_s: float
    architecture: str | None = None
    types: dict[str, float] | None = None
    context_length: int | None = None
    fault: str | None = None


def describe(entry: Entry, name: str) -> Description:
    """Reads the header; `name` is the one to show. Never raises for what is in the files."""
    states = [path.stat() for path in entry.files]
    n_bytes, modified_s = sum(state.st_size for state in states), max(state.st_mtime for state in states)
    if not entry.is_complete:
        fault = "not here whole: `prima pull` goes on with it"
        return Description(name, str(entry.path), n_bytes, modified_s, fault=fault)
    try:
        with GGUFFile.open(entry.path) as file:
            return Description(
                name,
                str(entry.path),
                n_bytes,
                modified_s,
                _text(file.metadata.get("general.architecture")),
                _types(file),
                *_context_and_fault(file),
            )
    except ModelError as error:
        return Description(name, str(entry.path), n_bytes, modified_s, fault=error.message)


def _context_and_fault(file: GGUFFile) -> tuple[int | None, str | None]:
    try:
        spec = read_spec(file.metadata, file.tensors)
    except ModelError as error:
        return None, error.message
    return spec.context_length, None


def _types(file: GGUFFile) -> dict[str, float]:
    weights = Counter[str]()
    for tensor in file.tensors.values():
        weights[tensor.type_name] += prod(tensor.shape)
    return {name: round(n / weights.total(), 4) for name, n in weights.most_common()}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
