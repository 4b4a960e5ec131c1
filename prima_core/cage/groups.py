"""Control groups: what a node's processes may take of memory, cores and disk, and what they took. Linux, v1 and v2.

A controller is used where it is mounted, so that a machine with some in v1 and some in v2 works as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prima_core.cage.limits import Limits
from prima_core.errors import ConfigError

V1_NAMES = {"memory": "memory", "cpu": "cpu", "io": "blkio"}
MOUNTS = Path("/proc/self/mounts")
KILL = 9
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy of groups and those of memory, cpu and io that it controls."""

    root: Path
    is_v2: bool
    controllers: tuple[str, ...]

    def names(self, prefix: str) -> list[str]:
        """Groups of ours that begin so."""
        return sorted(path.name for path in self.root.glob(f"{prefix}*") if path.is_dir())


def hierarchies(mounts: Path = MOUNTS) -> tuple[Hierarchy, ...]:
    """Those that control memory, cpu or io, each controller once. Raises ConfigError where one is nowhere."""
    found = tuple(_mounted(mounts))
    missing = set(V1_NAMES).difference(*(hierarchy.controllers for hierarchy in found))
    if missing:
        raise ConfigError(
            f"this kernel has no control groups for {', '.join(sorted(missing))} mounted",
            hint="mount /sys/fs/cgroup; in a container run it with --privileged and its own cgroup namespace off",
        )
    return found


def _mounted(mounts: Path) -> Iterator[Hierarchy]:
    taken: set[str] = set()
    for line in mounts.read_text().splitlines():
        _, root, kind, options, *_ = line.split()
        if kind == "cgroup":
            here = [name for name, v1 in V1_NAMES.items() if v1 in options.split(",")]
        elif kind == "cgroup2":
            here = [name for name in (Path(root) / "cgroup.controllers").read_text().split() if name in V1_NAMES]
        else:
            continue
        new = tuple(name for name in here if name not in taken)
        taken.update(new)
        if new:
            yield Hierarchy(Path(root), kind == "cgroup2", new)


class Group:
    """One node's group, in every hierarchy under the same name. `device` is the disk that is limited and counted, as
    "8:0"; None: none is limited, all are counted."""

    def __init__(self, name: str, found: Iterable[Hierarchy], device: str | None = None) -> None:
        self.name = name
        self._hierarchies = tuple(found)
        self._device = device

    def create(self, limits: Limits | None = None) -> None:
        """Make it, with these limits. Raises ConfigError."""
        for hierarchy in self._hierarchies:
            try:
                if hierarchy.is_v2:
                    _delegate(hierarchy)
                (hierarchy.root / self.name).mkdir()
            except OSError as error:
                raise ConfigError(
                    f"cannot make the control group {hierarchy.root / self.name}: {error.strerror}",
                    hint="in a container run it with --privileged and the host's cgroup namespace",
                ) from error
        if limits is not None:
            self._limit(limits)

    def _limit(self, limits: Limits) -> None:
        for controller in V1_NAMES:
            for file, text in _SETTINGS[controller, self._is_v2(controller)](limits, self._device):
                self._write(controller, file, text)

    @property
    def entrances(self) -> list[Path]:
        """A process that writes its id to each of these is in."""
        return [hierarchy.root / self.name / "cgroup.procs" for hierarchy in self._hierarchies]

    # ------------------------------------------------------------ what it took

    def processes(self) -> set[int]:
        found: set[int] = set()
        for entrance in self.entrances:
            with suppress(OSError):  # the group is gone
                found.update(map(int, entrance.read_text().split()))
        return found

    def read_bytes(self) -> int:
        """Read from the disk, by direct reads and by page faults alike."""
        if self._is_v2("io"):
            lines = (line.split() for line in self._read("io", "io.stat").splitlines())
            pairs = (pair.partition("=") for device, *facts in lines if self._counts(device) for pair in facts)
            return sum(int(value) for name, _, value in pairs if name == "rbytes")
        lines = (line.split() for line in self._read("io", "blkio.throttle.io_service_bytes").splitlines())
        return sum(int(words[2]) for words in lines if words[1:2] == ["Read"] and self._counts(words[0]))

    def _counts(self, device: str) -> bool:
        return self._device in (None, device)

    def peak_bytes(self) -> int:
        """Most memory that was in use, files' cached pages included."""
        return self._number("memory.peak" if self._is_v2("memory") else "memory.max_usage_in_bytes")

    def available_bytes(self) -> int:
        """What is free, or holds pages of files that nobody has used of late."""
        if self._is_v2("memory"):
            limit, usage = self._read("memory", "memory.max"), self._number("memory.current")
        else:
            limit, usage = self._read("memory", "memory.limit_in_bytes"), self._number("memory.usage_in_bytes")
        return int(limit) - usage + self._fact("memory.stat", "inactive_file")

    def killed(self) -> int:
        """Processes that were killed because the memory was full."""
        return self._fact("memory.events" if self._is_v2("memory") else "memory.oom_control", "oom_kill")

    def _fact(self, file: str, name: str) -> int:
        facts = dict(line.split()[:2] for line in self._read("memory", file).splitlines())
        return int(facts.get(name, 0))

    def _number(self, file: str) -> int:
        return int(self._read("memory", file))

    # ------------------------------------------------------------ files

    def _hierarchy(self, controller: str) -> Hierarchy:
        return next(hierarchy for hierarchy in self._hierarchies if controller in hierarchy.controllers)

    def _is_v2(self, controller: str) -> bool:
        return self._hierarchy(controller).is_v2

    def _read(self, controller: str, file: str) -> str:
        return (self._hierarchy(controller).root / self.name / file).read_text()

    def _write(self, controller: str, file: str, text: str) -> None:
        path = self._hierarchy(controller).root / self.name / file
        try:
            path.write_text(text)
        except OSError as error:
            raise ConfigError(
                f"cannot set {path} to {text}: {error.strerror}", hint="this kernel or container may lack it"
            ) from error


# ---------------------------------------------------------------- settings

Setting = tuple[str, str]


def _memory_v1(limits: Limits, device: str | None) -> Iterator[Setting]:
    yield "memory.limit_in_bytes", str(limits.memory_bytes)
    yield "memory.swappiness", "0"


def _memory_v2(limits: Limits, device: str | None) -> Iterator[Setting]:
    yield "memory.max", str(limits.memory_bytes)
    yield "memory.swap.max", "0"


def _cpu_v1(limits: Limits, device: str | None) -> Iterator[Setting]:
    if limits.cores is not None:
        yield "cpu.cfs_period_us", str(limits.period_us)
        yield "cpu.cfs_quota_us", str(_quota_us(limits))


def _cpu_v2(limits: Limits, device: str | None) -> Iterator[Setting]:
    if limits.cores is not None:
        yield "cpu.max", f"{_quota_us(limits)} {limits.period_us}"


def _quota_us(limits: Limits) -> int:
    return max(1000, int((limits.cores or 0) * limits.period_us))  # the kernel takes no less


def _io_v1(limits: Limits, device: str | None) -> Iterator[Setting]:
    if limits.disk_bytes_s is not None:
        yield "blkio.throttle.read_bps_device", f"{device} {limits.disk_bytes_s}"


def _io_v2(limits: Limits, device: str | None) -> Iterator[Setting]:
    if limits.disk_bytes_s is not None:
        yield "io.max", f"{device} rbps={limits.disk_bytes_s}"


_SETTINGS: Mapping[tuple[str, bool], Callable[[Limits, str | None], Iterator[Setting]]] = {
    ("memory", False): _memory_v1,
    ("memory", True): _memory_v2,
    ("cpu", False): _cpu_v1,
    ("cpu", True): _cpu_v2,
    ("io", False): _io_v1,
    ("io", True): _io_v2,
}


def _delegate(hierarchy: Hierarchy) -> None:
    """In v2 a group has only the controllers that the one above hands down."""
    (hierarchy.root / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in hierarchy.controllers))


# ---------------------------------------------------------------- the end


def remove_groups(prefix: str, deadline_s: float = 20.0, mounts: Path = MOUNTS) -> None:
    """End all processes in groups that begin so, and remove the groups. Raises TimeoutError when one stays."""
    until_s = time.monotonic() + deadline_s
    while left := [hierarchy.root / name for hierarchy in _mounted(mounts) for name in hierarchy.names(prefix)]:
        for folder in left:
            _end(folder)
        if time.monotonic() > until_s:
            raise TimeoutError(f"processes in {left[0]} do not end")
        time.sleep(_POLL_S)


def _end(folder: Path) -> None:
    """One try; what is still there in the next round was not gone yet."""
    with suppress(OSError):
        _lift_limits(folder)  # a process that waits for a slow disk cannot be killed
        for process in map(int, (folder / "cgroup.procs").read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(process, KILL)
        folder.rmdir()


def _lift_limits(folder: Path) -> None:
    for file, value in (("blkio.throttle.read_bps_device", "0"), ("io.max", "rbps=max")):
        if (folder / file).exists():
            for line in (folder / file).read_text().splitlines():
                (folder / file).write_text(f"{line.split()[0]} {value}")
