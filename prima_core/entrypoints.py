"""Finds the entry points of the group `prima`, distribution by distribution, so that a damaged one hurts nobody else.

(`importlib.metadata.entry_points` reads all distributions at once: one bad line in one file ends the program.)
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

from prima_core.hookspecs import PROJECT

OWN_DISTRIBUTION = "prima-llm"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a plugin comes from. `point` is None where the distribution speaks of prima but cannot be read."""

    name: str
    distribution: str
    version: str
    point: EntryPoint | None

    @property
    def id(self) -> str:
        return f"{self.distribution}:{self.name}"

    @property
    def rank(self) -> tuple[bool, str, str]:
        """Loading order: ours first, so that a stranger never takes one of our names; then by name."""
        return self.distribution != OWN_DISTRIBUTION, self.distribution, self.name


def find_sources() -> list[Source]:
    """All entry points in loading order. A distribution that is on `sys.path` twice counts once."""
    first: dict[str, list[Source]] = {}
    for distribution in distributions():
        if sources := _sources_of(distribution):
            first.setdefault(sources[0].distribution, sources)
    return sorted((source for sources in first.values() for source in sources), key=lambda source: source.rank)


def _sources_of(distribution: Distribution) -> list[Source]:
    try:
        points = tuple(distribution.entry_points.select(group=PROJECT))
    except Exception as error:  # noqa: BLE001  a stranger's metadata, and the reader checks nothing
        if not _speaks_of_prima(distribution):
            logger.debug("unreadable entry points, not of prima: %s", error)
            return []
        return [Source("?", *_name_and_version(distribution), None)]
    if not points:
        return []
    name, version = _name_and_version(distribution)
    return [Source(point.name, name, version, point) for point in points]


def _speaks_of_prima(distribution: Distribution) -> bool:
    try:
        return f"[{PROJECT}]" in (distribution.read_text("entry_points.txt") or "")
    except (OSError, UnicodeError):
        return False


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """The normalised name and the version, `?` where the metadata is missing or damaged."""
    try:
        metadata = distribution.metadata
        # no get() before Python 3.12
        name, version = (metadata[key] if key in metadata else "?" for key in ("Name", "Version"))  # noqa: SIM401
    except Exception as error:  # noqa: BLE001  as above; which exception depends on the Python version
        logger.debug("unreadable metadata: %s", error)
        return "?", "?"
    return re.sub(r"[-_.]+", "-", name).lower(), version
