"""Which machine this is, and which of its disks a file lies on: names that are equal where the thing is the same."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from prima_core.memory.cgroups import limiting_reads

_PROC = Path("/proc")
_BLOCKS = Path("/sys/dev/block")


def machine_name() -> str:
    """The same for all processes on this machine, in containers too where the kernel tells which start this is."""
    with suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def disk_name(path: Path) -> str:
    """Of the disk that a file lies on: readers of it share its rate. Where a control group limits how fast its
    processes read, these have a disk of their own. Raises OSError."""
    disk = whole_disk(path)
    group = None if disk is None else limiting_reads(_PROC, disk)
    return f"{machine_name()} {disk or path.stat().st_dev}" + (f" {group.name}" if group is not None else "")


def whole_disk(path: Path) -> str | None:
    """As Linux numbers it, "8:0", a partition's whole disk; None where the file system has no disk of its own (overlay,
    btrfs, tmpfs), or on other systems. Raises OSError."""
    if sys.platform == "win32":
        return None
    device = path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    block = _BLOCKS / name
    if not block.exists():
        return None
    return (block / ".." / "dev").resolve().read_text().strip() if (block / "partition").exists() else name
