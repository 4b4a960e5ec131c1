"""Whether two files hold the same model, without reading them whole."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prima_core.errors import ModelError
from prima_core.model.gguf import GGUFFile
from prima_core.model.split import all_parts, part_number

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ModelId:
    """What the head tells others about its model: enough to find the same file, nothing about where it lies."""

    fingerprint: str
    size: int
    name: str


def fingerprint(file: GGUFFile) -> str:
    """SHA-256 (64 hex digits) of the size, and of each part the whole header and 4 KiB from the middle of every tensor.

    Sampling every tensor, not every so many bytes, tells models apart that differ in a few of them (merged adapters).
    Damage elsewhere is not noticed. Raises ModelError when a tensor's type is not supported.
    """
    digest = hashlib.sha256(b"prima fingerprint 1\0" + file.size.to_bytes(8, "little"))
    for part in file.parts:
        with part.header_bytes() as header:
            digest.update(header)
        with part.read_sparsely():
            for name in sorted(part.header.tensors, key=lambda name: part.header.tensors[name].offset):
                data = file.view(name).data
                begin = max(0, (len(data) - _SAMPLE_BYTES) // 2)
                digest.update(data[begin : begin + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


def find_by_fingerprint(model: ModelId, places: Iterable[Path]) -> Path | None:
    """The first model of that size and fingerprint among `places`: files, or folders searched for *.gguf below.

    Of a split model it is the path of the first part. Files that cannot be read or are damaged are passed over; only
    those of the right size are opened at all.
    """
    return next((path for place in places for path in _candidates(place) if _is_model(path, model)), None)


def _candidates(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
        return
    for path in sorted(place.rglob("*.gguf")):
        if part_number(path) <= 1:  # the other parts go with the first
            yield path


def _is_model(path: Path, model: ModelId) -> bool:
    try:
        if sum(part.stat().st_size for part in all_parts(path)) != model.size:
            return False
        with GGUFFile.open(path) as file:
            return fingerprint(file) == model.fingerprint
    except (OSError, ModelError) as error:
        logger.info("%s is passed over: %s", path, error)
        return False
