"""Products with stacks of experts' matrices: each row its expert's bits, and nothing of other experts is read."""

import ctypes
import mmap
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy import _kernels
from prima_numpy.kernels import Kernels
from tests.prima_numpy.blocks import FLOAT_TYPES, QUANTISED, random_rows, random_stack

Int64s = NDArray[np.int64]
every_variant = pytest.mark.parametrize("variant", Kernels.variants())
TYPES = (*FLOAT_TYPES, *QUANTISED)


def ints(*values: int) -> Int64s:
    return np.array(values, np.int64)


def matrix_of(stack: Weight, expert: int) -> Weight:
    part = stack.part(expert, expert + 1)
    return Weight(part.name, part.type, part.shape[1:], part.data)


@every_variant
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_rows_get_the_bits_of_their_experts_matrix(variant: str, type: GGUFType) -> None:
    kernels, x = Kernels(2, variant), random_rows(70, 256)
    stacks = [random_stack(type, 5, 33, 256, seed=1), random_stack(type, 7, 50, 256, seed=2)]
    experts, starts = ints(4, 0, 3, 1), ints(0, 1, 1, 20, 70)
    for stack, got in zip(stacks, kernels.linear_experts(stacks, x, experts, starts), strict=True):
        for i, expert in enumerate(experts):
            rows = x[starts[i] : starts[i + 1]]
            np.testing.assert_array_equal(
                got[starts[i] : starts[i + 1]], kernels.linear(matrix_of(stack, expert), rows)
            )


@every_variant
@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_blocks_may_lie_at_any_address(variant: str, type: GGUFType) -> None:
    kernels, stack, x = Kernels(1, variant), random_stack(type, 3, 20, 256), random_rows(9, 256)
    moved = np.zeros(len(stack.data) + 1, np.uint8)[1:]
    moved[:] = stack.data
    odd = Weight("odd", type, stack.shape, moved)
    for expert in range(3):
        np.testing.assert_array_equal(
            kernels.linear(matrix_of(odd, expert), x), kernels.linear(matrix_of(stack, expert), x)
        )
    groups = ints(2, 1), ints(0, 4, 9)
    np.testing.assert_array_equal(
        kernels.linear_experts([odd], x, *groups), kernels.linear_experts([stack], x, *groups)
    )


def test_no_rows_are_no_work() -> None:
    [got] = Kernels(1).linear_experts([random_stack(GGUFType.Q4_K, 2, 9, 256)], random_rows(0, 256), ints(), ints(0))
    assert got.shape == (0, 9)


@pytest.mark.parametrize(
    ("experts", "starts", "says"),
    [
        (ints(2), ints(0, 5), "experts: 2 of 2"),
        (ints(-1), ints(0, 5), "experts: -1 of 2"),
        (ints(0), ints(0, 4), "starts: not from 0 to 5"),
        (ints(0), ints(1, 5), "starts: not from 0 to 5"),
        (ints(0, 1), ints(0, 7, 5), "starts: not in order"),
        (ints(0, 1), ints(0, 5), "starts: shape"),
        (np.zeros(1, np.int32), ints(0, 5), "not int64"),
    ],
)
def test_wrong_groups_are_refused(experts: Int64s, starts: Int64s, says: str) -> None:
    stack, x = random_stack(GGUFType.Q8_0, 2, 4, 32), random_rows(5, 32)
    with pytest.raises(ValueError, match=says):
        Kernels(1).linear_experts([stack], x, experts, starts)


@pytest.mark.parametrize(
    ("n_experts", "rows", "cols", "says"),
    [
        (3, 4, 32, "data"),
        (2, 5, 32, "data"),
        (2, 4, 64, "data"),
        (1, 4, 64, "x: 32 columns"),
        (-2, -4, 32, "stack"),
        (0, 4, 32, "stack"),
        (1 << 39, 1 << 39, 32, "stack"),
        (4, 2, 32, "out"),
    ],
)
def test_a_stack_that_does_not_fit_its_bytes_is_refused(n_experts: int, rows: int, cols: int, says: str) -> None:
    data, out = random_stack(GGUFType.Q8_0, 2, 4, 32).data, np.zeros((5, 4), np.float32)
    stack = int(GGUFType.Q8_0), data, n_experts, rows, cols, out
    with pytest.raises(ValueError, match=says):
        _kernels.Engine(1, "auto").linear_experts((stack,), random_rows(5, 32), ints(0), ints(0, 5))


# ---------------------------------------------------------------- bytes of other experts


def walled_stack(type: GGUFType, n_experts: int, used: set[int]) -> Weight:
    """A stack of zeros in which the pages of every other expert cannot be read: touching one ends the process."""
    block = BLOCKS[type]
    cols = 256
    rows = mmap.PAGESIZE * block.n_weights // cols  # so many whole pages that an expert's size is a multiple of one
    size = rows * cols // block.n_weights * block.n_bytes
    assert size % mmap.PAGESIZE == 0
    data = np.frombuffer(mmap.mmap(-1, n_experts * size), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for expert in set(range(n_experts)) - used:
        if protect(data.ctypes.data + expert * size, size, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return Weight("walled", type, (n_experts, rows, cols), data)


def read_some(type: GGUFType, expert: int) -> None:
    """What the process of the test below does."""
    for variant in Kernels.variants():
        for n in (1, 20):
            stack = walled_stack(type, 4, used={0, 2})
            Kernels(2, variant).linear_experts([stack], random_rows(n, 256), ints(0, expert), ints(0, n // 2, n))


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("expert", [2, 3])
def test_pages_of_other_experts_are_not_touched(expert: int) -> None:
    """Expert 3 lies behind the wall: it shows that the wall holds."""
    calls = "; ".join(f"read_some({int(type)}, {expert})" for type in TYPES)
    code = f"from tests.prima_numpy.test_kernels_experts import read_some; {calls}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode == 0) == (expert == 2), done.stderr.decode()
