"""The model's files: on which disk they lie and how fast it is, copies for nodes, and caches that are proven cold."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from prima_core.errors import ConfigError
from prima_core.memory.disks import whole_disk

READ_BYTES = 4 * 2**20
N_READERS = 4
MEASURE_S = 0.7
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
    """Bytes a second of direct reads, several in flight; a short measurement. Raises ConfigError."""
    path = max(paths, key=lambda path: path.stat().st_size)
    n_blocks = path.stat().st_size // READ_BYTES
    if n_blocks < N_READERS:
        raise ConfigError(
            f"{path} is too small to measure the disk by it",
            hint="write disk rates like 500MB/s, or take a larger model",
        )
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read directly: {error.strerror}", hint="write disk rates like 500MB/s"
        ) from error
    try:
        return _measured(file, n_blocks)
    finally:
        os.close(file)


def _measured(file: int, n_blocks: int) -> float:
    """Each reader has a part of the file."""
    if sys.platform == "win32":
        raise ConfigError("clusters are emulated on Linux only")
    counts = [0] * N_READERS
    began_s = time.monotonic()

    def read(reader: int) -> None:
        buffer = mmap.mmap(-1, READ_BYTES)  # at an address that direct reads take
        first, end = n_blocks * reader // N_READERS, n_blocks * (reader + 1) // N_READERS
        for block in range(first, end):
            if time.monotonic() - began_s > MEASURE_S:
                return
            counts[reader] += os.preadv(file, [buffer], block * READ_BYTES)

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(N_READERS)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    return sum(counts) / (time.monotonic() - began_s)


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
    """How much of a file is in the page cache, from 0 to 1. Asks `mincore`, which tells root the truth."""
    import ctypes

    import numpy as np

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-whole.size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(whole.size), pages.ctypes.data_as(ctypes.c_char_p)
        )
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        share = float((pages & 1).mean())
        del whole  # the map cannot be closed while it is looked at
    return share
