from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.memory.experts import Experts, expert_stacks
from prima_core.memory.residents import Indices
from prima_core.memory.system import System
from prima_core.model.gguf import GGUFFile
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from tests.memory.fake_system import ALIGNMENT, FakeSystem

N_LAYERS, N_EXPERTS, N_USED = 2, 12, 2
NAMES = ["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    model = TinyModel(
        arch="qwen3moe", types="Q4_K_M", n_layers=N_LAYERS, d_ff=256, n_experts=N_EXPERTS, n_experts_used=N_USED
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
    experts = Experts(file, range(N_LAYERS), N_USED, budget_bytes, system)
    try:
        yield experts
    finally:
        experts.close()


def require(experts: Experts, layer: int, chosen: list[int]) -> list[list[int]]:
    return [list(group) for group in groups(experts, layer, chosen)]


def groups(experts: Experts, layer: int, chosen: list[int]) -> Iterator[Indices]:
    gate = experts.weights(layer)[NAMES[0]]
    assert gate.require is not None
    return gate.require(np.array(chosen, np.intp))


def is_right(file: GGUFFile, experts: Experts, layer: int, group: Indices) -> bool:
    """Whether these experts of all stacks of the layer are as in the file."""
    pairs = [(experts.weights(layer)[name], file.view(f"blk.{layer}.{name}")) for name in NAMES]
    return all(np.array_equal(matrix(ours, e), matrix(theirs, e)) for ours, theirs in pairs for e in group)


def matrix(stack: Weight, expert: int) -> NDArray[np.uint8]:
    return stack.part(expert, expert + 1).data


# ---------------------------------------------------------------- bytes


def test_stacks_are_those_of_experts(file: GGUFFile) -> None:
    assert [info.name for info in expert_stacks(file, 1)] == [f"blk.1.{name}" for name in NAMES]


def test_weights_look_as_in_the_map_and_stay_the_same(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, 0) as experts:
        weights = experts.weights(1)
        assert list(weights) == NAMES
        for name, weight in weights.items():
            mapped = file.view(f"blk.1.{name}")
            assert (weight.name, weight.type, weight.shape) == (mapped.name, mapped.type, mapped.shape)
            assert len(weight.data) == len(mapped.data)
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
                came += group.tolist()
            assert sorted(came) == sorted(set(chosen))


def test_a_token_reads_its_experts_and_no_others(file: GGUFFile, system: FakeSystem) -> None:
    sizes = [info.n_bytes // N_EXPERTS for info in expert_stacks(file, 0)]
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 8])
        needed = 2 * sum(sizes)
        assert needed <= system.read_bytes <= needed + 2 * len(sizes) * 2 * ALIGNMENT
        assert experts.stats().read_bytes == system.read_bytes


def test_what_is_in_memory_is_not_read_again(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 8])
        require(experts, 1, [0, 1])
        n_reads = system.n_reads
        for _ in range(5):
            require(experts, 0, [8, 3])
            require(experts, 1, [0, 1])
        assert system.n_reads == n_reads
        assert (experts.stats().hits, experts.stats().misses) == (20, 4)
        assert experts.stats().hit_rate == 20 / 24


def test_those_in_memory_come_first(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, N_EXPERTS)) as experts:
        require(experts, 0, [5, 9])
        assert require(experts, 0, [1, 5, 7, 9]) == [[5, 9], [1, 7]]


def test_a_whole_layer_passes_through_room_for_one(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file)) as experts:
        assert require(experts, 0, list(range(N_EXPERTS))) == [[e] for e in range(N_EXPERTS)]


def test_part_of_a_stack_is_required_by_its_own_indices(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file)) as experts:
        part = experts.weights(0)[NAMES[1]].part(4, 9)
        assert part.require is not None
        [[group]] = list(part.require(np.array([2])))
        assert group == 2
        assert np.array_equal(matrix(part, 2), matrix(file.view(f"blk.0.{NAMES[1]}"), 6))


# ---------------------------------------------------------------- who stays


def test_frequent_experts_stay_while_rare_ones_pass(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 5)) as experts:
        for _ in range(8):
            require(experts, 0, [1, 2])
            require(experts, 1, [3, 4])
        n_reads = system.n_reads
        for rare in range(5, N_EXPERTS):
            require(experts, 0, [1, rare])
            require(experts, 1, [3, rare])
        n_rare = system.n_reads - n_reads
        require(experts, 0, [1, 2])
        require(experts, 1, [3, 4])
        assert system.n_reads - n_reads == n_rare


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
        assert system.released_bytes > 0
        experts.resize(one(file, 6))
        require(experts, 0, [0, 1, 2, 3, 4, 5])
        assert experts.n_bytes > one(file, 5)


def test_what_is_in_use_outlives_a_smaller_budget(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [0, 1])
        for group in groups(experts, 0, [0, 1]):
            experts.resize(0)
            assert is_right(file, experts, 0, group)
        assert experts.n_bytes == 0


def test_fill_reads_what_there_is_room_for_before_anything_is_asked_for(file: GGUFFile, system: FakeSystem) -> None:
    told: list[int] = []
    with opened(file, system, one(file, 2 * 4)) as experts:
        experts.fill(told.append)
        assert sum(told) == experts.n_bytes <= one(file, 8)
        assert experts.stats() == type(experts.stats())()
        require(experts, 0, [0, 1, 2, 3])
        require(experts, 1, [0, 1, 2, 3])
        assert experts.stats().misses == 0


# ---------------------------------------------------------------- bad days


def test_a_read_error_names_file_tensor_and_expert_and_the_next_step_works(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3])
        system.fails_after = 4
        with pytest.raises(ModelError, match=r"blk\.0\.ffn_.*_exps\.weight, expert [57].*moe\.gguf.*Input/output"):
            require(experts, 0, [3, 5, 7])
        system.fails_after = None
        for group in groups(experts, 0, [3, 5, 7]):
            assert is_right(file, experts, 0, group)


def test_a_file_that_became_shorter_is_told(file: GGUFFile, system: FakeSystem) -> None:
    system.cut_bytes = file.size - file.tensors["blk.1.ffn_up_exps.weight"].offset
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3])
        with pytest.raises(ModelError, match=r"blk\.1\.ffn_.*expert 3.* ends .* bytes before"):
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
    with pytest.raises(ModelError, match=r"moe\.gguf cannot be opened: No such file"):
        Experts(file, range(N_LAYERS), N_USED, 0, system)


def test_close_ends_threads_and_files(file: GGUFFile, system: FakeSystem) -> None:
    with opened(file, system, one(file, 4)) as experts:
        require(experts, 0, [3, 5])
        assert system.open_files == 1
    experts.close()
    assert (system.open_files, experts.n_bytes) == (0, 0)
