"""Amounts in a cluster file: sizes, rates and cores, as they are or as a share of something that is measured.

512MB          20% of model - 150MB          500MB/s          9% of disk          320Mbit/s          50% of machine
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TERM = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?)\s*(%\s*of\s+[a-z]+|[A-Za-z/]*)\s*")


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of amount is written: its units in capitals, and what a share is of."""

    units: dict[str, float]
    reference: str
    example: str


SIZE = Kind({"": 1, **_BYTES}, "model", '"1.5GB" or "20% of model - 150MB"')
DISK_RATE = Kind({f"{unit}/S": size for unit, size in _BYTES.items()}, "disk", '"500MB/s" or "25% of disk"')
LINK_RATE = Kind({"KBIT/S": 1e3, "MBIT/S": 1e6, "GBIT/S": 1e9}, "", '"320Mbit/s"')
CORES = Kind({"": 1}, "machine", '1.5 or "50% of machine"')


@dataclass(frozen=True, slots=True)
class Amount:
    """`plain` in bytes, bytes/s, bits/s or cores, and `share` of the kind's reference."""

    plain: float
    share: float = 0.0

    def of(self, reference: float) -> float:
        return self.plain + self.share * reference


def parse(text: str | float, kind: Kind) -> Amount:
    """Terms with + or - between them. Raises ValueError that says how it is written."""
    rest, terms = str(text).strip(), list[Amount]()
    while rest or not terms:
        match = _TERM.match(rest)
        if match is None or bool(match[1]) != bool(terms):  # a sign stands between terms, and only there
            raise _unreadable(text, kind)
        terms.append(_term(match, text, kind))
        rest = rest[match.end() :]
    return Amount(sum(term.plain for term in terms), sum(term.share for term in terms))


def _term(match: re.Match[str], text: str | float, kind: Kind) -> Amount:
    sign, digits, unit = match.groups()
    number = float(digits) * (-1 if sign == "-" else 1)
    if unit.startswith("%") and kind.reference and unit.split()[-1] == kind.reference:
        return Amount(0.0, number / 100)
    if unit.upper() not in kind.units:
        raise _unreadable(text, kind)
    return Amount(number * kind.units[unit.upper()])


def _unreadable(text: str | float, kind: Kind) -> ValueError:
    return ValueError(f"{text!r} is not understood, write it like {kind.example}")
