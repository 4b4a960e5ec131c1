"""What a node leaves to other programs: it answers while a hog takes memory, and takes its own back afterwards.

    python -m bench.owner MODEL.gguf [--limit 3GB] [--machine] [--hog 1.5GB] [--rate 500MB] [--file 1GB] [-t 2]
                          [-- --memory 2.5GB ...]

With --limit in a control group of this size that the node, the hog and the cached pages of what they read share; that
wants root. With --machine the group stands for a machine, of which a node leaves more to others. With --machine alone
it is this machine, all of it: nothing else may need memory meanwhile; the hog stops where less than 1 GB would be
available, and it and the node are the first to be killed. The hog takes what is left and half of what is pinned in a
group; of a machine, what is left but for half of the reserve.

A file of --file bytes is read twice before, and again every 3 s, as what its owner uses; how much of it stays cached
is watched. Beside it a file of a tenth that nobody touches again: a kernel may page out such although nobody needs the
room (DAMON does, after half a minute). What follows `--` goes to `prima serve`.

What a hog costs the file prima is not to blame for. So with --machine the hog comes twice, once without a node, to
leave as much as node and reserve had together, and once beside it. Both begin in the same state: nothing of the model
is cached, and all that is free is full of a file that programs have read twice and need no more, before the file in
use.

Prints a line each second, and what matters at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from bench.cpu_models import cache_folder
from prima_core.memory.system import Memory, host
from prima_core.node.node import parse_bytes
from prima_core.testing.pressure import GROUP_IS_MACHINE, CachedFile, Hog, MemoryGroup, memory_group, why_no_groups
from prima_core.testing.served import Served

CALM_S, HELD_S, BACK_WITHIN_S, EVERY_S, USED_EVERY_S = 8.0, 15.0, 90.0, 1.0, 3.0
HOG_WITHIN_S = 600.0
NO_TIMES = {"pinned_bytes": 0.0, "read_bytes": 0.0, "n_steps": 0.0}
FLOOR_BYTES = 10**9
PROMPT, N_TOKENS = "The owner of this machine", 8
GB = 1e9


@dataclass(slots=True)
class Client:
    """Asks the same again and again, in a thread of its own, until something fails."""

    node: Served
    first: str = ""
    n_right: int = 0
    n_other: int = 0
    fault: str = ""
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            self.first = self.node.answer(PROMPT, N_TOKENS)
            while not self.stopping.is_set():
                is_right = self.node.answer(PROMPT, N_TOKENS) == self.first
                self.n_right += is_right
                self.n_other += not is_right
        except OSError as error:
            self.fault = str(error)

    @contextmanager
    def asking(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self.stopping.set()
            thread.join()


@dataclass(frozen=True, slots=True)
class Moment:
    time_s: float
    pinned_bytes: float
    read_bytes: float
    n_steps: float
    available_bytes: int
    used_share: float
    cold_share: float


@dataclass(frozen=True, slots=True)
class Files:
    """`used`: is read now and then, `cold`: was read once."""

    used: CachedFile
    cold: CachedFile


@contextmanager
def same_state(model: Path, n_bytes: int, group: MemoryGroup | None, is_full: bool) -> Iterator[Files]:
    """Nothing of the model is cached, then the file of `n_bytes` is read twice; before it, where all is to be full, one
    as large as all that is available."""
    if sys.platform == "linux":
        with model.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as exits:
        if is_full:
            exits.enter_context(CachedFile(folder / "stale", available(group), group)).read()
        used = exits.enter_context(CachedFile(folder / "used", n_bytes, group))
        used.read()
        cold = exits.enter_context(CachedFile(folder / "cold", n_bytes // 10, group))
        exits.enter_context(in_use(used))
        yield Files(used, cold)


@contextmanager
def in_use(file: CachedFile) -> Iterator[None]:
    """Its owner reads it now and then, whatever else happens."""
    stopping = threading.Event()

    def read() -> None:
        while not stopping.wait(USED_EVERY_S):
            file.read()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def available(group: MemoryGroup | None) -> int:
    return host().memory().available_bytes if group is None else group.available_bytes


@dataclass(slots=True)
class Scene:
    """Where it happens: `group` None is the machine. `reserve`: what a node leaves of a machine; 0: it is none."""

    node: Served | None
    hog: Hog
    files: Files
    group: MemoryGroup | None
    reserve: int
    calm_bytes: int = 0
    moments: list[Moment] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def available(self) -> int:
        return available(self.group)

    def look(self) -> Moment:
        times = self.node.times() if self.node else NO_TIMES
        moment = Moment(
            time.monotonic() - self.began_s,
            times["pinned_bytes"],
            times["read_bytes"],
            times["n_steps"],
            self.available(),
            self.files.used.cached_share(),
            self.files.cold.cached_share(),
        )
        self.moments.append(moment)
        return moment

    def watch(self, what: str, for_s: float, is_over: Callable[[Moment], bool] = lambda now: False) -> None:
        """A line each second, for so long at most."""
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s:
            time.sleep(EVERY_S)
            now = self.look()
            print(line(what, self.moments[-2], now), flush=True)
            if is_over(now):
                return

    def hog_bytes(self) -> int:
        now = self.moments[-1]
        left = now.available_bytes - int(now.pinned_bytes)
        return left - self.reserve // 2 if self.reserve else left + int(now.pinned_bytes) // 2

    @property
    def used_share(self) -> float:
        """Of the file in use, what was cached at least."""
        return min(moment.used_share for moment in self.moments)


HEADER = (
    f"{'s':>5} {'':<10} {'pinned GB':>9} {'available GB':>12} {'used file':>9} {'cold file':>9} {'tokens/s':>8}"
    f" {'read GB/s':>9}"
)


def line(what: str, before: Moment, now: Moment) -> str:
    took_s = now.time_s - before.time_s
    return (
        f"{now.time_s:5.0f} {what:<10} {now.pinned_bytes / GB:9.2f} {now.available_bytes / GB:12.2f}"
        f" {now.used_share:9.1%} {now.cold_share:9.1%} {(now.n_steps - before.n_steps) / took_s:8.2f}"
        f" {(now.read_bytes - before.read_bytes) / took_s / GB:9.2f}"
    )


def run(scene: Scene, hog_bytes: int | None) -> None:
    planned = scene.look().pinned_bytes
    print(HEADER)
    scene.watch("calm", CALM_S)
    scene.calm_bytes = scene.moments[-1].available_bytes
    hog_comes(scene, scene.hog_bytes() if hog_bytes is None else hog_bytes)
    scene.watch("hog left", BACK_WITHIN_S, lambda now: now.pinned_bytes >= planned)


def hog_comes(scene: Scene, wanted: int) -> None:
    """And goes."""
    hogging = threading.Thread(target=scene.hog.hold, args=(wanted,))
    hogging.start()
    scene.watch("hog comes", HOG_WITHIN_S, lambda now: not hogging.is_alive())
    scene.watch(f"hog {wanted / GB:.2f}", HELD_S)
    hogging.join()
    scene.hog.hold(0)


def without(args: argparse.Namespace, group: MemoryGroup | None, reserve: int) -> float:
    """What of the file in use a hog alone leaves that takes as much as it will beside the node."""
    with ExitStack() as exits:
        files = exits.enter_context(same_state(args.model, args.file, group, is_full=True))
        scene = Scene(None, exits.enter_context(a_hog(args, group)), files, group, reserve)
        taken_before = taken_back()
        scene.look()
        print(HEADER)
        scene.watch("calm", CALM_S)
        hog_comes(scene, scene.available() - reserve // 2 - args.model.stat().st_size)
    print(f"without a node: {cached(scene)}")
    print(f"pages that the kernel had to take back or swap out: {taken_back() - taken_before}")
    return scene.used_share


@contextmanager
def a_hog(args: argparse.Namespace, group: MemoryGroup | None) -> Iterator[Hog]:
    with Hog(group, args.rate, 0 if group else FLOOR_BYTES) as hog:
        hog.hold(0)
        yield hog


def cached(scene: Scene) -> str:
    cold = min(moment.cold_share for moment in scene.moments)
    return f"cached at least {scene.used_share:.1%} of the file that is used, {cold:.1%} of the other"


def tell(scene: Scene, client: Client, taken_before: int) -> None:
    least = min(moment.pinned_bytes for moment in scene.moments)
    rates = [(b.n_steps - a.n_steps) / (b.time_s - a.time_s) for a, b in pairwise(scene.moments)]
    print(f"answers: {client.n_right} as the first, {client.n_other} others; {client.fault or 'none failed'}")
    print(f"pinned: {scene.moments[0].pinned_bytes / GB:.2f} GB, at least {least / GB:.2f} GB,", end=" ")
    print(f"{scene.moments[-1].pinned_bytes / GB:.2f} GB at the end")
    print(f"tokens a second: {max(rates):.2f} at best, {min(rates):.2f} at worst")
    print(f"least available: {min(moment.available_bytes for moment in scene.moments) / GB:.2f} GB")
    print(cached(scene))
    if scene.group is None:
        print(f"pages that the kernel had to take back or swap out: {taken_back() - taken_before}")
    else:
        print(f"the group: {scene.group.peak_bytes / GB:.2f} GB at most, {scene.group.n_killed} killed,", end=" ")
        print(f"{scene.group.number('memory.failcnt')} times full")


def taken_back() -> int:
    """By the kernel of Linux, for want of memory, from caches and programs, since it started."""
    file = Path("/proc/vmstat")
    facts = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    return sum(int(facts.get(name, 0)) for name in ("pgsteal_kswapd", "pgsteal_direct", "pswpout"))


def be_killed_first() -> None:
    """Of this machine's programs, should memory end: this one, and all that it starts."""
    file = Path("/proc/self/oom_score_adj")
    if file.exists():
        file.write_text("1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=parse_bytes)
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--hog", type=parse_bytes)
    parser.add_argument("--rate", type=parse_bytes, default=500 * 10**6)
    parser.add_argument("--file", type=parse_bytes, default=10**9)
    parser.add_argument("-t", "--threads", default="2")
    parser.add_argument("serve", nargs="*")
    args = parser.parse_args()
    if args.limit and (why := why_no_groups()):
        sys.exit(f"{why}: only --machine without --limit works here")
    if not args.limit and not args.machine:
        parser.error("either --limit or --machine, or both")
    be_killed_first()
    reserve = Memory(args.limit or host().memory().total_bytes, 0).reserve_bytes if args.machine else 0
    with ExitStack() as exits:
        group = exits.enter_context(memory_group(args.limit)) if args.limit else None
        alone = without(args, group, reserve) if args.machine else None
        scene = beside_a_node(args, group, reserve)
    if alone is not None:
        shares = f"{alone:.1%} stayed cached without a node, {scene.used_share:.1%} beside it"
        print(f"of the file that is used {shares}: prima costs it {100 * (alone - scene.used_share):.1f} points")


def beside_a_node(args: argparse.Namespace, group: MemoryGroup | None, reserve: int) -> Scene:
    prima = GROUP_IS_MACHINE if args.limit and args.machine else ("-m", "prima_core")
    options = ("-t", args.threads, "--parallel", "1", "-c", "512", *args.serve)
    with ExitStack() as exits:
        files = exits.enter_context(same_state(args.model, args.file, group, is_full=args.machine))
        hog = exits.enter_context(a_hog(args, group))
        free = available(group)
        node = exits.enter_context(Served([str(args.model), *options], group, prima))
        scene = Scene(node, hog, files, group, reserve)
        client, taken_before = Client(node), taken_back()
        with client.asking():
            run(scene, args.hog)
        total = args.limit or host().memory().total_bytes
        print(f"memory pressure of the node before the hog: {(free - scene.calm_bytes) / total:.1%}")
        tell(scene, client, taken_before)
    return scene


if __name__ == "__main__":
    main()
