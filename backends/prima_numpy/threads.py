"""How many threads compute where the user does not say."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

CGROUP, CPUS = Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Physical cores that this process may use, but no more than its cgroup's quota.

    The slow cores of a hybrid CPU count: they take fewer of a product's tasks, and the smallest ones last.
    """
    return max(1, min(_usable_cores(), cgroup_quota(CGROUP)))


def _usable_cores() -> int:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()  # Linux only
    if allowed and (described := n_cores(allowed, CPUS)):
        return described
    import psutil  # where it is needed: a probe imports little

    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(physical, len(allowed)) if allowed else physical


def n_cores(cpus: Collection[int], root: Path) -> int:
    """Physical cores that these logical CPUs belong to, as the system describes them at `root`; 0: it does not."""
    with suppress(OSError):
        return len({(root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
    return 0


def cgroup_quota(root: Path) -> int:
    """CPUs that the quota of the cgroup at `root` amounts to, rounded up; all of the machine's without a quota."""
    with suppress(OSError, ValueError):  # version 2: "max 100000" is no number, and no quota
        quota, period = (root / "cpu.max").read_text().split()
        return -(-int(quota) // int(period))
    with suppress(OSError, ValueError):  # version 1: -1 is no quota
        quota, period = ((root / "cpu" / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        if int(quota) > 0:
            return -(-int(quota) // int(period))
    return os.cpu_count() or 1
