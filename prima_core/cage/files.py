"""The model's files: on which disk they lie and how fast it is, copies for nodes, and caches that are proven cold."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prima_core.errors import ConfigError
from prima_core.memory.disks import whole_disk
from prima_core.memory.system import host
from prima_core.node.measure import disk_rate

SPARE_BYTES = 2**30
"""Free disk that copies leave."""


def disk_of(path: Path) -> str:
    """The disk that a file lies on, as "8:0"; a partition's whole disk. Raises ConfigError where there is none."""
    if sys.platform == "win32":
        raise ConfigError("clusters are emulated on Linux only")
    found = whole_disk(path)
    if found is None:
        raise ConfigError(
            f"{path} lies on a file system without a disk of its own (such as overlay, btrfs or tmpfs)",
            hint="put the model on ext4 or xfs; or leave disk rates out of the cluster",
        )
    return found


def direct_rate(paths: Sequence[Path]) -> float:
    """Bytes a second of direct reads, as nodes read weights; a short measurement. Raises ConfigError."""
    rate = disk_rate(paths, 0, host())
    if not rate:
        raise ConfigError(
            f"the disk cannot be measured by {paths[0]}: the file is too small, or cannot be read",
            hint="write disk rates like 500MB/s, or take a larger model",
        )
    return rate


# ---------------------------------------------------------------- copies


def check_room(paths: Sequence[Path], n_copies: int) -> None:
    """Raises ConfigError where so many copies of the files would fill their disk."""
    folder = paths[0].parent
    wanted, free = n_copies * sum(path.stat().st_size for path in paths), shutil.disk_usage(folder).free
    if wanted + SPARE_BYTES > free:
        raise ConfigError(
            f"{n_copies} copies of the model take {wanted / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free",
            hint="free some disk, or let nodes share the file (copy = false)",
        )


def copy_to(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Whole copies, under the same names. Raises ConfigError."""
    try:
        folder.mkdir(parents=True)
        return [Path(shutil.copyfile(path, folder / path.name)) for path in paths]
    except OSError as error:
        raise ConfigError(f"cannot copy the model to {folder}: {error.strerror}") from error


# ---------------------------------------------------------------- cold caches


def make_cold(paths: Sequence[Path]) -> None:
    """Write the files out and take them out of the page cache. Raises ConfigError for one that stays there."""
    for path in paths:
        _drop(path)
        cached = cached_share(path)
        if cached:
            raise ConfigError(
                f"{cached:.0%} of {path} stays in the page cache: another program has it open",
                hint="end what uses it, or measure a copy of the file",
            )


def _drop(path: Path) -> None:
    if sys.platform != "linux":
        raise ConfigError("clusters are emulated on Linux only")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """How much of a file is in the page cache, from 0 to 1. Raises ConfigError where the system does not tell."""
    data = np.memmap(path, np.uint8, "r")
    resident = host().resident_bytes(data, path)
    if resident is None:
        raise ConfigError(f"the system does not tell how much of {path} is cached", hint="run it as root")
    return resident / len(data)
