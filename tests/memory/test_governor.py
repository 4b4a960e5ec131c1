"""How much stays pinned while others take and leave memory: decided without any, then by a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest

from prima_core.memory import governor
from prima_core.memory.governor import (
    GROW_EVERY_S,
    LOOK_EVERY_S,
    MAX_PATIENCE_S,
    MAX_STEP_BYTES,
    PROCESS_BYTES,
    QUIET_S,
    Governor,
    Sight,
    State,
    decide,
    room_bytes,
)
from prima_core.memory.system import Memory, MemoryKind

MB, GB = 10**6, 10**9
PLANNED = 8 * GB
LONG_S = 1e6


def memory(available_bytes: int, total_bytes: int = 20 * GB, mapped_bytes: int = 0) -> Memory:
    return Memory(total_bytes, available_bytes, mapped_bytes)


RESERVE = memory(0).reserve_bytes
MARGIN = RESERVE // 4


def sight(left_bytes: int, pinned_bytes: int = PLANNED, lost_bytes: int = 0, pressure: float = 0.0) -> Sight:
    return Sight(memory(left_bytes + pinned_bytes), pinned_bytes, lost_bytes, 0, pressure)


def test_what_the_plan_pins_stays_while_the_reserve_is_left() -> None:
    assert decide(PLANNED, State(PLANNED), sight(RESERVE), LONG_S).wanted_bytes == PLANNED


def test_what_is_lacking_is_given_up_at_once_with_a_margin() -> None:
    decided = decide(PLANNED, State(PLANNED), sight(RESERVE - 300 * MB), 0.0)
    assert decided.wanted_bytes == PLANNED - 300 * MB - MARGIN


def test_others_that_take_fast_find_as_much_again() -> None:
    left, fall = RESERVE - 300 * MB, 4 * GB
    seen = sight(left)
    state = State(PLANNED, available_bytes=seen.memory.available_bytes + fall)
    assert decide(PLANNED, state, seen, 0.0).wanted_bytes == PLANNED - (fall - left)


def test_no_more_is_given_up_than_there_is() -> None:
    assert decide(PLANNED, State(PLANNED), sight(-50 * GB), 0.0).wanted_bytes == 0
    assert decide(PLANNED, State(0), sight(-GB, pinned_bytes=0), 0.0).wanted_bytes == 0


def test_what_was_given_up_before_stays_given_up_while_the_store_still_holds_it() -> None:
    assert decide(PLANNED, State(GB), sight(RESERVE - MB), 0.0).wanted_bytes == GB


def test_pages_of_others_that_are_in_use_count_as_taken() -> None:
    """Two nodes on a machine: what each holds looks available to the other."""
    alone = Sight(memory(PLANNED + RESERVE), PLANNED)
    together = Sight(memory(PLANNED + RESERVE, mapped_bytes=PLANNED + GB), PLANNED)
    assert alone.lacking_bytes == 0
    assert together.lacking_bytes == GB


def test_what_a_device_has_copied_is_not_counted_twice() -> None:
    """Others' available memory does not contain it."""
    seen = Sight(memory(RESERVE + PLANNED // 4), PLANNED, copied_bytes=3 * PLANNED // 4)
    assert seen.left_bytes == RESERVE


def test_pages_that_the_system_took_back_are_given_up_although_memory_seems_left() -> None:
    seen = sight(5 * RESERVE, lost_bytes=GB)
    assert decide(PLANNED, State(PLANNED), seen, 0.0).wanted_bytes == PLANNED - GB - MARGIN


def test_a_few_lost_pages_change_nothing() -> None:
    assert sight(5 * RESERVE, lost_bytes=PLANNED // 200).lacking_bytes == 0


def test_twice_the_reserve_is_left_where_processes_wait_for_memory() -> None:
    assert sight(2 * RESERVE - MB).lacking_bytes == 0
    assert sight(2 * RESERVE - MB, pressure=0.3).lacking_bytes == MB
    assert sight(2 * RESERVE, pressure=0.9).lacking_bytes == 0


def test_nothing_comes_back_before_there_was_quiet_for_a_while() -> None:
    state = decide(PLANNED, State(PLANNED), sight(RESERVE - MB), 100.0)
    held = state.wanted_bytes
    seen = sight(4 * RESERVE, pinned_bytes=held)
    assert decide(PLANNED, state, seen, 100.0 + QUIET_S - 0.1).wanted_bytes == held
    assert decide(PLANNED, state, seen, 100.0 + QUIET_S).wanted_bytes > held


def test_it_comes_back_in_bounded_steps_with_time_between() -> None:
    state = decide(PLANNED, State(GB), sight(9 * GB, pinned_bytes=GB), LONG_S)
    assert state.wanted_bytes == GB + MAX_STEP_BYTES
    seen = sight(9 * GB, pinned_bytes=state.wanted_bytes)
    assert decide(PLANNED, state, seen, LONG_S + GROW_EVERY_S / 2).wanted_bytes == state.wanted_bytes
    assert decide(PLANNED, state, seen, LONG_S + GROW_EVERY_S).wanted_bytes == state.wanted_bytes + MAX_STEP_BYTES


def test_it_never_exceeds_the_plan() -> None:
    state = State(PLANNED - MB)
    assert decide(PLANNED, state, sight(9 * GB, PLANNED - MB), LONG_S).wanted_bytes == PLANNED
    assert decide(PLANNED, State(PLANNED), sight(9 * GB), LONG_S).wanted_bytes == PLANNED


def test_nothing_comes_back_that_would_soon_be_given_up_again() -> None:
    state = decide(PLANNED, State(PLANNED), sight(RESERVE - 300 * MB), 0.0)
    same = sight(RESERVE + MARGIN, pinned_bytes=state.wanted_bytes)
    assert decide(PLANNED, state, same, LONG_S).wanted_bytes == state.wanted_bytes


def test_nothing_comes_back_while_processes_wait_for_memory() -> None:
    assert decide(PLANNED, State(GB), sight(9 * GB, GB, pressure=0.2), LONG_S).wanted_bytes == GB


def test_steps_smaller_than_a_tensor_add_up_until_it_fits() -> None:
    state, now_s = State(GB), LONG_S
    for _ in range(4):
        state, now_s = decide(PLANNED, state, sight(9 * GB, pinned_bytes=GB), now_s), now_s + GROW_EVERY_S
    assert state.wanted_bytes == GB + 4 * MAX_STEP_BYTES


def test_what_is_still_to_come_is_not_promised_twice() -> None:
    state = State(2 * GB)
    left = RESERVE + 2 * MARGIN + GB
    assert decide(PLANNED, state, sight(left, pinned_bytes=GB), LONG_S).wanted_bytes == 2 * GB


def test_who_asks_again_after_each_step_is_waited_for_longer_and_longer() -> None:
    state, now_s, waits = State(PLANNED), 0.0, []
    for _ in range(9):
        state = decide(PLANNED, state, sight(RESERVE - MB, state.wanted_bytes), now_s)
        waits.append(state.patience_s)
        now_s += state.patience_s
        state = decide(PLANNED, state, sight(9 * GB, state.wanted_bytes), now_s)
        assert state.grown_s == now_s
        now_s += 1.0
    assert waits[:3] == [QUIET_S, 2 * QUIET_S, 4 * QUIET_S]
    assert waits[-1] == MAX_PATIENCE_S
    later = decide(PLANNED, state, sight(RESERVE - MB, state.wanted_bytes), now_s + 2 * MAX_PATIENCE_S)
    assert later.patience_s == QUIET_S


def test_a_shortage_that_goes_on_is_one_shortage() -> None:
    state = State(PLANNED)
    for look in range(100):
        state = decide(PLANNED, state, sight(RESERVE - MB, state.wanted_bytes), look * LOOK_EVERY_S)
    assert state.patience_s == QUIET_S


@pytest.mark.parametrize(
    ("total", "kind", "reserve"),
    [
        (2 * GB, MemoryKind.MACHINE, GB // 2),
        (8 * GB, MemoryKind.MACHINE, 1500 * MB),
        (24 * GB, MemoryKind.MACHINE, 2400 * MB),
        (512 * GB, MemoryKind.MACHINE, 4 * GB),
        (8 * GB, MemoryKind.PHONE, 1600 * MB),
        (3 * GB, MemoryKind.PHONE, GB),
        (100 * MB, MemoryKind.GROUP, 16 * MB),
        (GB, MemoryKind.GROUP, 20 * MB),
        (100 * GB, MemoryKind.GROUP, 256 * MB),
    ],
)
def test_the_reserve_is_a_bounded_share(total: int, kind: MemoryKind, reserve: int) -> None:
    assert Memory(total, total, kind=kind).reserve_bytes == reserve


def test_a_node_that_takes_the_room_there_is_gives_nothing_up() -> None:
    before = memory(12 * GB, mapped_bytes=300 * MB)
    room = room_bytes(before)
    after = memory(12 * GB - PROCESS_BYTES, mapped_bytes=300 * MB + room)
    assert Sight(after, room).lacking_bytes == 0
    assert Sight(replace(after, mapped_bytes=after.mapped_bytes + 1), room).lacking_bytes == 1


def test_no_room_is_none() -> None:
    assert room_bytes(memory(GB)) == 0


# ---------------------------------------------------------------- with others at work


@dataclass
class Machine:
    """Memory that others take parts of; the store's pages count as available."""

    total_bytes: int = 20 * GB
    others_bytes: int = GB
    pressure_now: float | None = None
    fault: OSError | None = None

    def memory(self) -> Memory:
        if self.fault is not None:
            raise self.fault
        return memory(self.total_bytes - self.others_bytes, self.total_bytes)

    def pressure(self) -> float | None:
        return self.pressure_now


@dataclass
class Tensors:
    """A store of tensors of one size. Its `fault` is raised once."""

    n_held: int = 80
    tensor_bytes: int = 100 * MB
    lost: int | None = None
    copied_bytes: int = 0
    fault: OSError | None = None
    sizes: list[int] = field(default_factory=list)
    resized: threading.Event = field(default_factory=threading.Event)

    @property
    def pinned_bytes(self) -> int:
        return self.n_held * self.tensor_bytes

    def resize(self, pinned_bytes: int) -> None:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.n_held = pinned_bytes // self.tensor_bytes
        self.sizes.append(self.pinned_bytes)
        self.resized.set()

    def lost_bytes(self) -> int | None:
        lost, self.lost = self.lost, None
        return lost


@dataclass
class Scene:
    """A governor whose clock stands still between looks."""

    machine: Machine = field(default_factory=Machine)
    store: Tensors = field(default_factory=Tensors)
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.governor = Governor(self.store, self.machine, self.store.pinned_bytes, lambda: self.now_s)

    def look(self, n: int = 1) -> None:
        for _ in range(n):
            self.now_s += LOOK_EVERY_S
            self.governor.look()

    @property
    def left_bytes(self) -> int:
        return self.machine.total_bytes - self.machine.others_bytes - self.store.pinned_bytes


def test_a_program_that_grows_finds_memory_and_all_is_pinned_again_when_it_has_left() -> None:
    scene = Scene()
    for _ in range(60):  # 0.8 GB/s
        scene.machine.others_bytes += 200 * MB
        scene.look()
        assert scene.left_bytes >= RESERVE
    assert 0 < scene.governor.pinned_bytes < PLANNED
    scene.machine.others_bytes = GB
    scene.look(400)
    assert scene.governor.pinned_bytes == PLANNED


@pytest.mark.parametrize("seed", range(8))
def test_whatever_others_do_they_have_the_reserve_or_nothing_is_pinned(seed: int) -> None:
    scene, draw = Scene(), Random(seed)
    for _ in range(3000):
        scene.machine.others_bytes = min(19 * GB, max(0, scene.machine.others_bytes + draw.randint(-GB, GB)))
        scene.look()
        assert scene.left_bytes >= RESERVE or not scene.store.pinned_bytes
        assert scene.store.pinned_bytes <= PLANNED


def test_memory_that_comes_and_goes_is_not_run_after() -> None:
    """A compiler in another window: 4 GB more for a second, every eight seconds, for ten minutes. Taken back as soon as
    it is free would be 100 GB from the disk."""
    scene = Scene(Machine(others_bytes=9 * GB))
    for look in range(2400):
        scene.machine.others_bytes = (13 if look % 32 < 4 else 9) * GB
        scene.look()
    sizes = [PLANNED, *scene.store.sizes]
    assert sum(max(0, after - before) for before, after in pairwise(sizes)) < 25 * GB


def test_nothing_is_done_while_nothing_changes() -> None:
    scene = Scene()
    scene.look(100)
    assert scene.store.sizes == []


def test_lost_pages_are_counted_now_and_then_and_given_up() -> None:
    scene = Scene()
    scene.look()
    scene.store.lost = GB
    scene.look(int(governor.COUNT_LOST_EVERY_S / LOOK_EVERY_S) - 1)
    assert scene.store.sizes == []
    scene.look()
    assert scene.governor.pinned_bytes <= PLANNED - GB


def test_what_could_not_be_given_up_is_given_up_at_the_next_look() -> None:
    scene = Scene()
    scene.look()
    scene.machine.others_bytes = 12 * GB
    scene.store.fault = OSError("no")
    with pytest.raises(OSError, match="no"):
        scene.look()
    scene.look()
    assert scene.left_bytes >= RESERVE


def test_an_operator_reads_what_goes_and_what_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prima_core.memory.governor")
    scene = Scene(Machine(others_bytes=9 * GB))
    scene.look()
    scene.machine.others_bytes = 10 * GB + 500 * MB
    scene.look()
    scene.machine.others_bytes = GB
    scene.look(400)
    gone, back = (record.getMessage() for record in caplog.records)
    assert gone.startswith("others need memory, 1.50 GB are left: 7.00 GB of weights stay in it, 1.00 GB")
    assert back == "others have memory again: 8.00 GB of weights stay in it, as planned"


def test_what_cannot_be_given_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "prima_core.memory.governor")
    scene = Scene()
    for _ in range(2):
        scene.machine.others_bytes = 19 * GB
        scene.look(50)
        scene.machine.others_bytes = GB
        scene.look(400)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("others still lack 1.00 GB, and no more weights can leave memory")


# ---------------------------------------------------------------- the thread


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Scene], None]]:
    """Starts a scene's governor, with little time between looks."""
    monkeypatch.setattr(governor, "LOOK_EVERY_S", 0.001)
    started: list[Governor] = []

    def start(scene: Scene) -> None:
        started.append(scene.governor)
        scene.governor.start()

    yield start
    for one in started:
        one.close()


def test_the_thread_gives_up_what_others_need_without_any_pass(running: Callable[[Scene], None]) -> None:
    scene = Scene(Machine(others_bytes=12 * GB))
    running(scene)
    assert scene.store.resized.wait(10)


def test_a_closed_governor_leaves_the_store_alone(running: Callable[[Scene], None]) -> None:
    scene = Scene()
    running(scene)
    scene.governor.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prima-governor"]
    scene.governor.close()


def test_where_the_plan_pins_nothing_there_is_no_thread(running: Callable[[Scene], None]) -> None:
    running(Scene(store=Tensors(n_held=0)))
    assert not [thread for thread in threading.enumerate() if thread.name == "prima-governor"]


def test_a_governor_that_never_started_closes() -> None:
    Scene().governor.close()


def test_a_fault_is_told_once_and_the_thread_goes_on(
    running: Callable[[Scene], None], caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(Machine(others_bytes=12 * GB, fault=OSError("meminfo is gone")))
    seen = threading.Semaphore(0)
    tell_memory = scene.machine.memory

    def counted() -> Memory:
        seen.release()
        return tell_memory()

    scene.machine.memory = counted  # type: ignore[method-assign]
    running(scene)
    for _ in range(5):
        assert seen.acquire(timeout=10)
    scene.machine.fault = None
    assert scene.store.resized.wait(10)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["what weights stay in memory cannot follow what others leave: meminfo is gone"]
