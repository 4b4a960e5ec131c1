"""Limits of the Linux control groups that this process is in, version 1 and 2, from the innermost outwards: of memory,
and whether there are some of speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from prima_core.memory.system import Memory, MemoryKind


def limits(proc: Path) -> Iterator[Memory]:
    """The memory of each group with a limit. What cannot be read is no limit."""
    for folder in _folders(proc):
        memory = _of_version_2(folder) if (folder / "memory.current").exists() else _of_version_1(folder)
        if memory is not None:
            yield memory


def pressure_files(proc: Path) -> Iterator[Path]:
    """Where the kernel tells of the pressure in each group: version 2 alone does."""
    for folder in _folders(proc):
        if (folder / "memory.pressure").exists():
            yield folder / "memory.pressure"


def slowing(proc: Path) -> Iterator[str]:
    """What limits the speed of this process's groups, as the kernel writes it: to tell one limit from another."""
    for controller, names in _SPEED.items():
        for folder in _folders(proc, controller):
            yield from (f"{name} {text}" for name in names if (text := _text(folder / name).strip()))


_SPEED = {"cpu": ("cpu.max", "cpu.cfs_quota_us"), "blkio": ("io.max", "blkio.throttle.read_bps_device")}


def limiting_reads(proc: Path, disk: str) -> Path | None:
    """The innermost of this process's groups whose reads of a disk ("8:0") are limited, all its processes together."""
    for folder in _folders(proc, "blkio"):
        lines = [_text(folder / name).splitlines() for name in _SPEED["blkio"]]
        words = (line.split() for line in (*lines[0], *lines[1]))
        if any(word[0] == disk and (word[1].isdecimal() or _limits_reads(word[1:])) for word in words if word[1:]):
            return folder
    return None


def _limits_reads(settings: list[str]) -> bool:
    return any(one.startswith("rbps=") and one != "rbps=max" for one in settings)


def _of_version_2(folder: Path) -> Memory | None:
    # above `high` the kernel takes memory back and slows the group down: nobody wants to live there
    known = [limit for name in ("memory.max", "memory.high") if (limit := _number(folder / name)) is not None]
    used = _number(folder / "memory.current")
    return _memory(min(known), used, key_values(_text(folder / "memory.stat")), "") if known else None


def _of_version_1(folder: Path) -> Memory | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    return _memory(limit, used, key_values(_text(folder / "memory.stat")), "total_") if limit is not None else None


def _memory(limit: int, used: int | None, facts: dict[str, int], prefix: str) -> Memory | None:
    """Pages of files are the group's to take back, those in active use too; shared memory is not among them."""
    if used is None:
        return None
    files = facts.get(f"{prefix}active_file", 0) + facts.get(f"{prefix}inactive_file", 0)
    mapped = facts.get("file_mapped", facts.get("total_mapped_file", 0)) - facts.get(f"{prefix}shmem", 0)
    return Memory(limit, min(limit, max(0, limit - used + files)), max(0, mapped), MemoryKind.GROUP)


# ---------------------------------------------------------------- where the groups are


def _folders(proc: Path, controller: str = "memory") -> Iterator[Path]:
    """The folders of this process's groups with a say in it, each followed by those around it."""
    paths = dict(_paths(_text(proc / "self" / "cgroup"), controller))
    for version, root, mount in _mounts(_text(proc / "self" / "mountinfo"), controller):
        if version in paths:
            inside = _inside(paths[version], root)
            yield from (mount / part for part in (inside, *inside.parents))


def _paths(text: str, controller: str) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, path of this process's group); lines are `4:memory:/a/b` and `0::/a/b`."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, PurePosixPath(path)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(path)


def _mounts(text: str, controller: str) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """(version, which group is mounted, where); see proc_pid_mountinfo(5)."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.rpartition(" ")[2].split(",")):
            root, mount = (_unescaped(field) for field in before.split()[3:5])
            yield 2 if kind == "cgroup2" else 1, PurePosixPath(root), Path(mount)


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _inside(path: PurePosixPath, root: PurePosixPath) -> PurePosixPath:
    """`path` as it is called below the mount; in a container that sees its own group only, that is the mount itself."""
    try:
        inside = path.relative_to(root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


# ---------------------------------------------------------------- what is in the files


def key_values(text: str) -> dict[str, int]:
    """Of lines `name 123` or `Name: 123 kB`: the number as it stands there."""
    words = (line.replace(":", " ").split() for line in text.splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _number(path: Path) -> int | None:
    """None for `max`, and for a file that is not there or not for us."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""
