import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import DeviceMemoryError, ModelError
from prima_core.interfaces import ExpertGroup, Weight
from prima_core.memory import readers
from prima_core.memory.experts import Experts
from prima_core.memory.system import System
from prima_core.model.gguf import GGUFFile
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.memory.fakes import ALIGNMENT, FakeSystem

N_LAYERS, N_EXPERTS, N_USED = 2, 12, 2
NAMES = ["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"]
STACKS = {layer: [f"blk.{layer}.{name}" for name in NAMES] for layer in range(N_LAYERS)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    model = TinyModel(
        arch="qwen3moe", types="Q4_K", n_layers=N_LAYERS, d_ff=256, n_experts=N_EXPERTS, n_experts_used=N_USED
    )
    with GGUFFile.open(write_tiny_model(tmp_path_factory.mktemp("models") / "moe.gguf", model)) as file:
        yield file


@pytest.fixture
def system() -> FakeSystem:
    return FakeSystem()


def one(file: GGUFFile, n: int = 1) -> int:
    """Bytes of budget that n experts of any layer take at most."""
    with opened(file, FakeSystem(), 1 << 40) as experts:
        sizes = []
        for layer in range(N_LAYERS):
            before = experts.n_bytes
            require(experts, layer, [0])
            sizes.append(experts.n_bytes - before)
    return n * max(sizes)


@contextmanager
def opened(file: GGUFFile, system: System, budget_bytes: int) -> Iterator[Experts]:
    experts = Experts(file, STACKS, N_USED, budget_bytes, system)
    try:
        yield experts
    finally:
        experts.close()


def require(experts: Experts, layer: int, chosen: list[int]) -> list[list[int]]:
    return [group.tolist() for group, _ in groups(experts, layer, chosen)]


def groups(experts: Experts, layer: int, chosen: list[int]) -> Iterator[ExpertGroup]:
    gate = experts.weights(layer)[NAMES[0]]
    assert gate.require is not None
    return gate.require(np.array(chosen, np.intp))


def is_right(file: GGUFFile, experts: Experts, layer: int, group: ExpertGroup) -> bool:
    """Whether these experts of all stacks of the layer are as in the file."""
    pairs = [(experts.weights(layer)[name], file.view(f"blk.{layer}.{name}")) for name in NAMES]
    return all(
        np.array_equal(matrix(ours, place), matrix(theirs, expert))
        for ours, theirs in pairs
        for expert, place in zip(*group, strict=True)
    )


def matrix(stack: Weight, place: int) -> NDArray[np.uint8]:
    return stack.part(place, place + 1).data


# ---------------------------------------------------------------- bytes


def test_weights_look_as_in_the_map_and_stay_the_same(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, 0) as experts:
        weights = experts.weights(1)
        assert list(weights) == NAMES
        for name, weight in weights.items():
            mapped = file.view(f"blk.1.{name}")
            assert (weight.name, weight.type, weight.shape) == (mapped.name, mapped.type, mapped.shape)
            assert len(weight.data) * N_EXPERTS == len(mapped.data) * weight.places
            assert not weight.data.flags.writeable
        assert experts.weights(1) is weights


@pytest.mark.parametrize("n_in_memory", [0, 1, 2, 3, 7, N_EXPERTS, 2 * N_EXPERTS])
def test_every_group_is_as_in_the_file_whatever_the_budget(file: GGUFFile, n_in_memory: int) -> None:
    random = np.random.default_rng(n_in_memory)
    budget = one(file, n_in_memory)
    with opened(file, FakeSystem(), budget) as experts:
        for turn in range(40):
            layer = turn % N_LAYERS
            chosen = random.integers(0, N_EXPERTS, random.integers(1, 30)).tolist()
            came: list[int] = []
            for group in groups(experts, layer, chosen):
                assert is_right(file, experts, layer, group)
                assert experts.n_bytes <= max(budget, one(file))
                came += group[0].tolist()
            assert sorted(came) == sorted(set(chosen))


def test_a_token_reads_its_experts_and_no_others(file: GGUFFile, system: FakeSystem) -> None:
    sizes = [file.tensors[name].n_bytes // N_EXPERTS for name in STACKS[0]]
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 8])
        needed = 2 * sum(sizes)
        read = sum(length for _, length in system.reads)
        assert needed <= read <= needed + 2 * len(sizes) * 2 * ALIGNMENT
        assert experts.stats().read_bytes == read


def test_what_is_in_memory_is_not_read_again(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 8])
        require(experts, 1, [0, 1])
        n_reads = len(system.reads)
        for _ in range(5):
            require(experts, 0, [8, 3])
            require(experts, 1, [0, 1])
        assert len(system.reads) == n_reads
        assert (experts.stats().hits, experts.stats().misses) == (20, 4)


def test_those_in_memory_come_first(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, N_EXPERTS)) as experts:
        require(experts, 0, [5, 9])
        assert require(experts, 0, [1, 5, 7, 9]) == [[5, 9], [1, 7]]


def test_a_whole_layer_passes_through_room_for_one(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file)) as experts:
        assert require(experts, 0, list(range(N_EXPERTS))) == [[e] for e in range(N_EXPERTS)]


def test_part_of_a_stack_is_a_view_of_places(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file)) as experts:
        stack = experts.weights(0)[NAMES[1]]
        for [expert], [place] in groups(experts, 0, [6]):
            part = stack.part(place, place + 1)
            assert part.shape == (1, *stack.shape[1:])
            assert part.require is None
            assert np.array_equal(part.part(0, 1).data, matrix(file.view(stack.name), expert))


# ---------------------------------------------------------------- who stays


def test_frequent_experts_stay_while_rare_ones_pass(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 5)) as experts:
        for _ in range(8):
            require(experts, 0, [1, 2])
            require(experts, 1, [3, 4])
        n_reads = len(system.reads)
        for rare in range(5, N_EXPERTS):
            require(experts, 0, [1, rare])
            require(experts, 1, [3, rare])
        n_rare = len(system.reads) - n_reads
        require(experts, 0, [1, 2])
        require(experts, 1, [3, 4])
        assert len(system.reads) - n_reads == n_rare


def test_habits_of_long_ago_are_forgotten(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 2)) as experts:
        for _ in range(500):
            require(experts, 0, [1, 2])
        for _ in range(100):
            require(experts, 0, [3, 4])
        misses = experts.stats().misses
        require(experts, 0, [3, 4])
        assert experts.stats().misses == misses


def test_a_smaller_budget_holds_at_once_and_a_larger_one_fills_again(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 6)) as experts:
        require(experts, 0, [0, 1, 2, 3, 4, 5])
        experts.resize(one(file, 2))
        assert experts.n_bytes <= one(file, 2)
        assert system.released
        experts.resize(one(file, 6))
        require(experts, 0, [0, 1, 2, 3, 4, 5])
        assert experts.n_bytes > one(file, 5)


def test_what_is_in_use_outlives_a_smaller_budget(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [0, 1])
        for group in groups(experts, 0, [0, 1]):
            experts.resize(0)
            assert is_right(file, experts, 0, group)
        assert experts.n_bytes <= one(file)


# ---------------------------------------------------------------- bad days


def test_a_read_error_names_file_tensor_and_expert_and_the_next_step_works(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3])
        left = iter(range(4))

        def fault(offset: int) -> None:
            if next(left, None) is None:
                raise OSError(errno.EIO, "Input/output error")

        system.fault = fault
        with pytest.raises(
            ModelError, match=r"moe\.gguf cannot be .*\(blk\.0\.ffn_.*_exps\.weight, expert [57]\): Input"
        ):
            require(experts, 0, [3, 5, 7])
        system.fault = lambda offset: None
        for group in groups(experts, 0, [3, 5, 7]):
            assert is_right(file, experts, 0, group)


def test_a_file_that_became_shorter_is_told(file: GGUFFile, system: FakeSystem) -> None:
    system.end = file.tensors["blk.1.ffn_up_exps.weight"].offset
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3])
        with pytest.raises(ModelError, match=r"blk\.1\.ffn_.*expert 3.*truncated"):
            require(experts, 1, [3])


def test_a_consumer_that_stops_in_the_middle_holds_nothing(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 2)) as experts:
        for _ in groups(experts, 0, list(range(N_EXPERTS))):
            break
        for group in groups(experts, 0, [9, 10, 11]):
            assert is_right(file, experts, 0, group)
        assert experts.n_bytes <= one(file, 2)


def test_a_file_that_cannot_be_opened_is_named(file: GGUFFile, system: FakeSystem) -> None:
    def gone(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    system.open_direct = gone  # type: ignore[method-assign, assignment]  # a fake of a fake
    with pytest.raises(ModelError, match=r"moe\.gguf cannot be read: No such file"):
        Experts(file, STACKS, N_USED, 0, system)


def test_close_ends_threads_and_files(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 5])
        assert system.open_files == 1
    experts.close()
    assert system.open_files == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prima-reader")]


def n_readers() -> int:
    return sum(thread.name.startswith("prima-reader") for thread in threading.enumerate())


def test_whatever_a_reader_meets_is_told_and_it_goes_on(file: GGUFFile, system: FakeSystem) -> None:
    def fault(offset: int) -> None:
        raise ValueError("an address that is not aligned")

    with opened(file, system, one(file, 4)) as experts:
        system.fault = fault
        for _ in range(3):
            with pytest.raises(ModelError, match="ValueError: an address"):
                require(experts, 0, [3, 5])
        assert n_readers() == 4


def test_close_leaves_a_disk_that_hangs_behind(
    file: GGUFFile, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "JOIN_S", 0.01)
    is_open, is_reached = threading.Event(), threading.Event()

    def fault(offset: int) -> None:
        is_reached.set()
        assert is_open.wait(30)

    def ask() -> None:
        with pytest.raises(ModelError, match="the store was closed"):
            require(experts, 0, list(range(N_EXPERTS)))

    system.fault = fault
    with opened(file, system, one(file, 12)) as experts:
        asking = threading.Thread(target=ask)
        asking.start()
        assert is_reached.wait(30)
        threads = experts._readers._threads
        experts.close()
        assert any(thread.is_alive() for thread in threads)
        is_open.set()
        for thread in (*threads, asking):
            thread.join()


def test_the_slots_of_a_disk_that_hangs_are_used_again_once_it_has_answered(
    file: GGUFFile, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "STALLED_AFTER_S", 0.01)
    is_open = threading.Event()
    system.fault = lambda offset: None if is_open.wait(30) else pytest.fail("nobody opened it")
    with opened(file, system, one(file, 2)) as experts:
        with pytest.raises(ModelError, match="the disk gave nothing"):
            require(experts, 0, [3, 5])
        monkeypatch.setattr(readers, "STALLED_AFTER_S", 30.0)
        is_open.set()
        deadline = time.monotonic() + 30
        before = -1
        while (hits := experts.stats().hits) != before + 2:  # both stay
            before = hits
            for group in groups(experts, 0, [7, 9]):
                assert is_right(file, experts, 0, group)
            assert time.monotonic() < deadline, "slots are missing"


def test_a_disk_that_hangs_for_hours_is_an_error_of_every_request_and_none_once_it_has_answered(
    file: GGUFFile, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open = threading.Event()
    with opened(file, system, one(file, 2 * N_EXPERTS)) as experts:
        require(experts, 0, [0])
        system.fault = lambda offset: None if is_open.wait(30) else pytest.fail("nobody opened it")
        monkeypatch.setattr(readers, "STALLED_AFTER_S", 0.0)
        said = []
        for _ in range(4 * N_EXPERTS):
            with pytest.raises(ModelError) as caught:
                require(experts, 1, [3, 5])
            said.append(caught.value.message)
        assert "gave nothing" in said[0]
        assert "has not answered for a while" in said[-1]
        assert require(experts, 0, [0]) == [[0]], "what is in memory needs no disk"
        monkeypatch.setattr(readers, "STALLED_AFTER_S", 30.0)
        is_open.set()
        deadline = time.monotonic() + 30
        while True:
            with suppress(ModelError):
                require(experts, 1, [3, 5])
                break
            assert time.monotonic() < deadline, "slots are missing"


def test_where_there_is_no_more_memory_others_go(file: GGUFFile, system: FakeSystem) -> None:
    """As on Windows, where memory has to be claimed before it is written."""
    with opened(file, system, one(file, 2 * N_EXPERTS)) as experts:
        require(experts, 0, [3, 5])
        n_bytes = experts.n_bytes
        system.claim = claimed_already(system, experts)  # type: ignore[method-assign, assignment]  # a fake of a fake
        for group in groups(experts, 0, [5, 7, 9, 11]):
            assert is_right(file, experts, 0, group)
        assert experts.n_bytes == n_bytes


def claimed_already(system: FakeSystem, experts: Experts) -> Callable[[memoryview], None]:
    """Memory that is there can be claimed, and no other."""
    kind = experts._kinds[0]
    there = {
        kind.slots.place(stack, slot).ctypes.data
        for slot in range(kind.n_slots)
        if slot not in kind.residents._empty
        for stack in range(len(NAMES))
    }

    def claim(part: memoryview) -> None:
        if np.frombuffer(part, np.uint8).ctypes.data not in there:
            raise MemoryError(f"no {len(part)} bytes")

    return claim


def test_an_expert_that_finds_no_memory_comes_when_there_is_some(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 2)) as experts:
        system.is_full = True
        with pytest.raises(DeviceMemoryError, match="no memory for an expert"):
            require(experts, 0, [3, 5])
        system.is_full = False
        for group in groups(experts, 0, [3, 5]):
            assert is_right(file, experts, 0, group)
        assert experts.n_bytes <= one(file, 2)


def test_where_there_is_no_room_for_them_nothing_is_left_open(file: GGUFFile) -> None:
    class Full(FakeSystem):
        def buffer(self, n_bytes: int, *, is_filled: bool = False) -> memoryview:
            if not is_filled:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return super().buffer(n_bytes)

    system = Full()
    with pytest.raises(OSError, match="Cannot allocate"):
        Experts(file, STACKS, N_USED, 0, system)
    assert (system.open_files, n_readers()) == (0, 0)


def test_a_file_that_was_changed_since_it_was_mapped_is_refused(tmp_path: Path, file: GGUFFile) -> None:
    path, system = tmp_path / "moe.gguf", FakeSystem()
    path.write_bytes(file.path.read_bytes())
    with GGUFFile.open(path) as changed:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ModelError, match="changed or replaced"):
            Experts(changed, STACKS, N_USED, 0, system)
    assert (system.open_files, n_readers()) == (0, 0)
