"""Typed, bounded access to the keys `{arch}.*` of a model file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prima_core.errors import ModelError
from prima_core.model.header import Value, printable

Scalar = bool | int | float | str
_TINIEST = 1e-20
"""Numbers closer to 0 are refused where 0 is: as float32, or when something is divided by them, they would be 0."""


class Facts:
    """What a file says about its model, in the words of its family.

    `defaults` are the keys that this family has beyond those of all, with what an absent one means.
    """

    def __init__(self, metadata: Mapping[str, Value], arch: str, defaults: Mapping[str, Scalar]) -> None:
        self.metadata = metadata
        self.arch = arch
        self.defaults = defaults

    def get(self, key: str) -> Scalar | None:
        value = self.metadata.get(f"{self.arch}.{key}", self.defaults.get(key))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self.error(key, "is an array; values per layer are not supported")

    def error(self, key: str, message: str, hint: str = "") -> ModelError:
        return ModelError(message, field=f"{self.arch}.{key}", hint=hint)

    def count(self, key: str, most: int, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing in the metadata")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is {show(value)}, not a whole number")
        if not least <= value <= most:
            raise self.error(key, f"is {value}; sane values are {least} to {most}")
        return value

    def number(self, key: str, above: float, most: float, default: float | None = None) -> float:
        """A finite float that is greater than `above` (0: by more than a trifle) and at most `most`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing in the metadata")
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.error(key, f"is {show(value)}, not a finite float")
        least = above or _TINIEST
        if not least < value <= most:
            raise self.error(key, f"is {value:g}; sane values are above {least:g} and at most {most:g}")
        return value

    def amount(self, key: str, most: float) -> float:
        """A finite float from 0 to `most`; 0 where it is absent."""
        return 0.0 if self.get(key) in (None, 0.0) else self.number(key, 0.0, most)

    def flags(self, key: str, n: int) -> tuple[bool, ...] | None:
        """An array of `n` truth values (or numbers 0 and 1); None where the key is absent or no array."""
        value = self.metadata.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        if len(value) != n or not np.isin(value, (0, 1)).all():
            raise self.error(key, f"is no array of {n} truth values, one for each layer")
        return tuple(bool(flag) for flag in value)


def show(value: object) -> str:
    return printable(repr(value))
