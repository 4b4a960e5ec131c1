"""bench/cpu.py: models of real shapes and random weights, made on the spot, and whether there is room for them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from prima_core.interfaces import KvType
from prima_core.model.quant import GGUFType, kv_row_bytes, tensor_bytes
from prima_core.testing.tinymodel import LLAMA_1B_SHAPE, TinyModel, Types, big_shape, tensors

LLAMA_8B_SHAPE = replace(
    LLAMA_1B_SHAPE, n_layers=32, d_model=4096, d_ff=14336, tied_output=False, rope_scaling=None,
)  # fmt: skip
# Name, shape; the 8B one with the context of Llama-3.1, so that --depth fits.
SHAPES = {"1b": ("Llama-3.2-1B", LLAMA_1B_SHAPE), "8b": ("Llama-3-8B", LLAMA_8B_SHAPE)}
TYPES: tuple[Types, ...] = ("Q4_K_M", "Q8_0")
SPARE_BYTES = 1 << 30
"""Disk, and memory, that is left to others beside a model."""


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model to be measured: `name` is the real one whose shape it has."""

    key: str
    name: str
    shape: TinyModel

    @property
    def file_name(self) -> str:
        return f"{self.key}-{self.shape.types.lower()}.gguf"

    @property
    def tensor_bytes(self) -> int:
        """What its file holds of tensors: all but some megabytes of vocabulary."""
        return sum(tensor_bytes(GGUFType[tensor.type], tensor.shape) for tensor in tensors(self.shape))

    def kv_bytes(self, n_tokens: int) -> int:
        """K and V of one sequence, in f16, which is prima's and llama.cpp's default."""
        shape = self.shape
        row = kv_row_bytes(KvType.F16, shape.dim_of_head)
        return 2 * shape.n_layers * shape.n_kv_heads * row * n_tokens


def bench_model(key: str, types: Types) -> BenchModel:
    name, shape = SHAPES[key]
    return BenchModel(key, name, replace(shape, types=types))


def cache_folder() -> Path:
    """Where the system wants files of a user that can be made again. Not the temporary folder: it may be memory."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prima" / "bench"


# ---------------------------------------------------------------- room


@dataclass(frozen=True, slots=True)
class Room:
    """What is free."""

    disk_bytes: int
    memory_bytes: int


def room(folder: Path) -> Room:
    folder.mkdir(parents=True, exist_ok=True)
    return Room(shutil.disk_usage(folder).free, int(psutil.virtual_memory().available))


def why_not(model: BenchModel, there: Room, is_written: bool) -> str:
    """Why the model cannot be measured here, with both sizes; "" where it can. `is_written`: its file lies there."""
    if not is_written and (lacks := _lacks("free disk", model.tensor_bytes, there.disk_bytes)):
        return lacks
    return _lacks("available memory", model.tensor_bytes, there.memory_bytes)


def why_not_repacked(model: BenchModel, there: Room) -> str:
    """The same for llama.cpp's repacked weights, which are a second copy beside the map."""
    return _lacks("available memory", 2 * model.tensor_bytes, there.memory_bytes)


def _lacks(what: str, n_bytes: int, free: int) -> str:
    if n_bytes + SPARE_BYTES <= free:
        return ""
    return f"it takes {n_bytes / 1e9:.1f} GB and 1 GB to spare, but there are {free / 1e9:.1f} GB of {what}"


# ---------------------------------------------------------------- files


@contextmanager
def model_file(
    model: BenchModel, folder: Path, keep: bool, wrote: Callable[[int], None] = lambda n_bytes: None
) -> Iterator[Path]:
    """The model's file in `folder`, written where it is not there; it goes at the end unless it is to be kept.

    `wrote` is told the bytes of each tensor as it is written. A file of that name is always whole.
    """
    path = folder / model.file_name
    if not path.exists():
        _write(path, model.shape, wrote)
    try:
        yield path
    finally:
        if not keep:
            path.unlink()


def _write(path: Path, shape: TinyModel, wrote: Callable[[int], None]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        big_shape(part, shape, wrote)
        with part.open("rb+") as file:  # now, lest the disk be busy with it while speed is measured
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
