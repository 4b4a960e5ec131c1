"""The kernels on 64-bit ARM: cross-compiled, run by an emulator of several CPUs, equal to the numpy twin to the bit.

Skipped without cross compiler and emulator, unless PRIMA_REQUIRE_NEON=1 says that they must be there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from prima_core.model.quant import GGUFType
from tests.prima_numpy.blocks import random_rows, random_weight
from tests.prima_numpy.native_cases import all_cases, linear_case
from tests.prima_numpy.native_driver import Case, Driver, build_driver

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CPUS = {
    "cortex-a53": ("neon", "portable"),
    "cortex-a76": ("neon_dotprod", "neon", "portable"),
    "max": ("neon_i8mm", "neon_dotprod", "neon", "portable"),
}
"""Variants that run on a CPU, best first."""
SMALLEST = {variant: cpu for cpu in reversed(CPUS) for variant in CPUS[cpu]}
"""The CPU with the fewest features that a variant runs on: an instruction of a newer one would end the program."""
ON = Callable[[str], Driver]

pytestmark = [
    pytest.mark.timeout(300),  # the first test compiles: half a minute of CPU time
    pytest.mark.skipif(
        os.environ.get("PRIMA_REQUIRE_NEON") != "1" and not (shutil.which(COMPILER) and EMULATOR),
        reason=f"no {COMPILER}, or no qemu-aarch64",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(
        tmp_path_factory.mktemp("arm"),
        f"CMAKE_CXX_COMPILER={COMPILER}",
        "CMAKE_SYSTEM_NAME=Linux",
        "CMAKE_SYSTEM_PROCESSOR=aarch64",
        "CMAKE_EXE_LINKER_FLAGS=-static",  # the emulator needs no libraries for the target
    )


@pytest.fixture(scope="module")
def on(program: Path) -> ON:
    """A driver on a CPU."""
    return lambda cpu: driver_on(program, cpu)


def driver_on(program: Path, cpu: str, threads: int = 1) -> Driver:
    assert EMULATOR, "qemu-aarch64 is missing"
    return Driver(program, (EMULATOR, "-cpu", cpu), threads)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return all_cases()


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_gets_the_variants_that_it_can_run(on: ON, cpu: str) -> None:
    assert on(cpu).variants() == CPUS[cpu]
    assert on(cpu).features() == ("neon", "dotprod", "i8mm")[: len(CPUS[cpu]) - 1]


@pytest.mark.parametrize("variant", SMALLEST)
def test_a_variant_gives_the_bits_of_the_twin(on: ON, cases: list[Case], variant: str) -> None:
    assert on(SMALLEST[variant]).wrong(variant, cases) == []


@pytest.mark.parametrize("cpu", CPUS)
def test_what_a_cpu_chooses_gives_the_bits_of_the_twin(on: ON, cases: list[Case], cpu: str) -> None:
    assert on(cpu).wrong("auto", list(islice(cases, 0, None, 7))) == []


@pytest.mark.parametrize("n", [1, 9])
def test_the_number_of_threads_changes_nothing(program: Path, n: int) -> None:
    case = linear_case(random_weight(GGUFType.Q4_K, 517, 512), random_rows(n, 512))  # large enough to be spread
    assert driver_on(program, "max", threads=3).wrong("auto", [case]) == []


def test_a_wrong_bit_is_told(on: ON) -> None:
    case = linear_case(random_weight(GGUFType.Q8_0, 5, 32), random_rows(2, 32))
    other = case.expected.copy()
    other[1, 3] = -other[1, 3]
    (fault,) = on("max").wrong("auto", [replace(case, expected=other)])
    assert "1 of 10" in fault
    assert "(1, 3)" in fault


@pytest.mark.parametrize(
    "numbers", [(8, 5, 32, 3), (8, 6, 32, 2), (8, 5, 64, 2), (8, 5, 33, 2), (9, 5, 32, 2), (8, -1, 32, 2)]
)
def test_a_case_of_wrong_sizes_is_refused(on: ON, numbers: tuple[int, ...]) -> None:
    case = linear_case(random_weight(GGUFType.Q8_0, 5, 32), random_rows(2, 32))
    with pytest.raises(ValueError, match="Q8_0"):
        on("max").results("auto", [replace(case, numbers=numbers)])


def test_a_variant_that_a_cpu_cannot_run_is_refused(on: ON) -> None:
    case = linear_case(random_weight(GGUFType.Q8_0, 5, 32), random_rows(2, 32))
    with pytest.raises(ValueError, match="neon_i8mm"):
        on("cortex-a76").results("neon_i8mm", [case])
