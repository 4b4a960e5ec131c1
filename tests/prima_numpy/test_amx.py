"""Variant amx on CPUs without AMX: the kernels are compiled with the tile instructions emulated."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.kernels import Kernels
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight
from tests.prima_numpy.native_cases import expert_cases, hostile_cases, linear_case, product_cases
from tests.prima_numpy.native_driver import SOURCE, Case, Driver, build_driver

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or ""
ONE_OF_A_KIND = (GGUFType.Q4_0, GGUFType.Q5_1, GGUFType.Q2_K, GGUFType.Q3_K, GGUFType.Q4_K, GGUFType.Q6_K)
"""One type for each way in which blocks become tiles."""
pytestmark = pytest.mark.timeout(300)  # the first test compiles: a quarter of a minute of CPU time and more
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="the driver and its compiler's options are POSIX's")
needs_avx512 = pytest.mark.skipif(
    sys.platform == "win32" or "avx512vbmi" not in Kernels.variants(),
    reason="all but the tile instructions runs on this CPU: it needs AVX-512 with VBMI",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def driver(folder: Path) -> Driver:
    """Compiled without optimisation, which is quicker than what it saves."""
    settings = ("PRIMA_EMULATE_TILES=ON", "CMAKE_CXX_FLAGS_RELEASE=-O0", "CMAKE_EXPORT_COMPILE_COMMANDS=ON")
    return Driver(build_driver(folder, *settings))


@needs_avx512
def test_the_variant_is_chosen_where_there_are_tiles(driver: Driver) -> None:
    assert driver.variants() == ("amx", *(name for name in Kernels.variants() if name != "amx"))


@needs_avx512
@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_products_equal_the_twin(driver: Driver, type: GGUFType) -> None:
    assert driver.wrong("amx", list(product_cases([type]))) == []


@needs_avx512
def test_sizes_around_the_edges_of_tiles_equal_the_twin(driver: Driver) -> None:
    assert driver.wrong("amx", list(edge_cases())) == []


def edge_cases() -> Iterator[Case]:
    for type in ONE_OF_A_KIND:
        blocks = (1, 4, 5, 8, 9, 15) if BLOCKS[type].n_weights == 32 else (1, 2)
        cols = [n * BLOCKS[type].n_weights for n in blocks]
        for rows, n in product((1, 16, 17, 31, 32, 33, 65), (5, 15, 16, 17, 32)):
            yield linear_case(random_weight(type, rows, cols[-1]), random_rows(n, cols[-1]))
        for width in cols:
            yield linear_case(random_weight(type, 40, width), random_rows(20, width), bias=random_rows(1, 40)[0])
        yield linear_case(random_weight(type, 3, cols[0]), random_rows(530, cols[0]))  # more than a strip


@needs_avx512
def test_blocks_and_activations_of_any_bytes_equal_the_twin(driver: Driver) -> None:
    assert driver.wrong("amx", list(hostile_cases((1, 9)))) == []


@needs_avx512
def test_experts_products_equal_the_twin(driver: Driver) -> None:
    assert driver.wrong("amx", list(expert_cases())) == []


@needs_avx512
def test_threads_have_tiles_of_their_own(folder: Path, driver: Driver) -> None:
    cases = [linear_case(random_weight(type, 300, 512), random_rows(40, 512)) for type in ONE_OF_A_KIND]
    assert Driver(folder / "driver", threads=5).wrong("amx", cases) == []


@needs_avx512
def test_without_emulation_the_code_has_the_instructions(folder: Path, driver: Driver) -> None:
    commands = json.loads((folder / "compile_commands.json").read_text())
    (command,) = (shlex.split(c["command"]) for c in commands if c["file"].endswith("amx.cpp"))
    command = [word for word in command if word != "-DPRIMA_EMULATE_TILES"]
    command[command.index("-o") + 1] = str(folder / "amx.s")
    command[command.index("-c")] = "-S"
    subprocess.run(command, cwd=folder, check=True, timeout=50)
    code = (folder / "amx.s").read_text()
    for instruction in ("ldtilecfg", "tileloadd", "tdpbusd", "tdpbssd", "tilestored", "tilerelease"):
        assert instruction in code


# ---------------------------------------------------------------- the emulation itself


@pytest.fixture(scope="module")
def tiles(folder: Path) -> Path:
    program, native = folder / "tiles", Path(__file__).parents[2] / "backends" / "prima_numpy" / "native"
    command = [COMPILER, "-std=c++17", "-Wall", "-Werror", f"-I{native}", str(SOURCE / "tiles.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=50)
    return program


@on_posix
@pytest.mark.parametrize(("shape", "rows", "columns"), [("whole", 16, 64), ("part", 5, 32)])
def test_the_emulated_products_are_those_of_the_manual(tiles: Path, shape: str, rows: int, columns: int) -> None:
    """sum[m][n] += a[m][4 k + i] * b[k][4 n + i]"""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (2, 16, 64), np.uint8)
    c = rng.integers(-(2**31), 2**31, (16, 16), np.int32)
    done = subprocess.run(
        [tiles, shape], input=a.tobytes() + b.tobytes() + c.tobytes(), capture_output=True, check=True
    )
    right = b[: columns // 4].view(np.int8).reshape(-1, 16, 4).astype(np.int64)
    for got, left in zip(np.frombuffer(done.stdout, np.int32).reshape(2, 16, 16), (a.view(np.int8), a), strict=True):
        products = np.einsum("mki,kni->mn", left[:rows, :columns].reshape(rows, -1, 4).astype(np.int64), right)
        np.testing.assert_array_equal(got[:rows], (c[:rows] + products).astype(np.int32))
        assert not got[rows:].any()


@on_posix
@pytest.mark.parametrize("fault", ["unconfigured", "released", "unused", "palette", "large", "shapes", "twice"])
def test_the_emulation_ends_where_a_cpu_would_fault(tiles: Path, fault: str) -> None:
    done = subprocess.run([tiles, fault], input=bytes(3 * 1024), capture_output=True, check=False)
    assert b"a tile instruction would fault" in done.stderr
    assert done.returncode != 0
