"""The native kernels without Python: `native/driver.cpp`, built for any CPU, runs cases there or in an emulator."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).parent / "native"
BUILD_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel as `driver.cpp` takes it, and the bits that the numpy twin gives for it."""

    name: str
    operation: str
    numbers: tuple[int, ...]
    buffers: tuple[NDArray[Any], ...]  # of whatever type the operation takes
    expected: NDArray[Any]


class Driver:
    """A built driver; `prefix` is the emulator and its arguments, if it needs one."""

    def __init__(self, program: Path, prefix: Sequence[str] = (), threads: int = 1) -> None:
        self._command = (*prefix, str(program), str(threads))

    def variants(self) -> tuple[str, ...]:
        """Those that run on its CPU, best first."""
        return tuple(self._describe()[0].split())

    def features(self) -> tuple[str, ...]:
        return tuple(self._describe()[1].split())

    def wrong(self, variant: str, cases: Sequence[Case]) -> list[str]:
        """What of a variant's results is not the twin's, case by case: empty when all bits are the same."""
        return [
            fault for case, got in zip(cases, self.results(variant, cases), strict=True) if (fault := _fault(case, got))
        ]

    def results(self, variant: str, cases: Sequence[Case]) -> list[bytes]:
        """Of all cases, from one process. Raises ValueError for a case that it refuses."""
        requests = b"".join(_request(variant, case) for case in cases)
        done = subprocess.run(self._command, input=requests, capture_output=True, timeout=RUN_TIMEOUT_S, check=False)
        answers = list(_answers(done.stdout))
        if done.returncode != 0 or len(answers) != len(cases):
            where = cases[len(answers)].name if len(answers) < len(cases) else "the end"
            raise RuntimeError(f"{variant} ended with {done.returncode} at {where}: {done.stderr.decode()}")
        for case, (status, answer) in zip(cases, answers, strict=True):
            if status != 0:
                raise ValueError(f"{case.name}: {answer.decode()}")
        return [answer for _, answer in answers]

    def _describe(self) -> list[str]:
        (text,) = self.results("auto", [Case("describe", "describe", (), (), np.empty(0))])
        return text.decode().splitlines()


def build_driver(folder: Path, *definitions: str) -> Path:
    """Compile the driver in `folder`; `definitions` are CMake's, such as CMAKE_CXX_COMPILER=... for another target."""
    settings = (
        "CMAKE_CXX_FLAGS_RELEASE=-O2",
        "CMAKE_BUILD_TYPE=Release",
        f"Python_EXECUTABLE={sys.executable}",
        *definitions,
    )
    _run("cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(folder), *(f"-D{setting}" for setting in settings))
    _run("cmake", "--build", str(folder))
    return folder / "driver"


def bits_of(value: float) -> int:
    """A float among a case's numbers."""
    return int(np.float32(value).view(np.uint32))


def _run(*command: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja lie beside Python
    program = shutil.which(command[0], path=path) or command[0]
    done = subprocess.run(
        [program, *command[1:]],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def _request(variant: str, case: Case) -> bytes:
    parts = [struct.pack("24s24sq", case.operation.encode(), variant.encode(), len(case.numbers))]
    parts.append(struct.pack(f"{len(case.numbers)}qq", *case.numbers, len(case.buffers)))
    for buffer in case.buffers:
        parts += [struct.pack("q", buffer.nbytes), buffer.tobytes()]
    return b"".join(parts)


def _answers(data: bytes) -> list[tuple[int, bytes]]:
    """Status and bytes of each; what was cut off is left out."""
    answers, at = [], 0
    while at + 16 <= len(data):
        status, size = struct.unpack_from("qq", data, at)
        if at + 16 + size > len(data):
            break
        answers.append((status, data[at + 16 : at + 16 + size]))
        at += 16 + size
    return answers


def _fault(case: Case, got: bytes) -> str:
    if len(got) != case.expected.nbytes:
        return f"{case.name}: {len(got)} bytes where {case.expected.nbytes} are expected"
    values = np.frombuffer(got, case.expected.dtype).reshape(case.expected.shape)
    if np.array_equal(values, case.expected, equal_nan=case.expected.dtype.kind == "f"):
        return ""
    at = np.argwhere(~((values == case.expected) | ((values != values) & (case.expected != case.expected))))
    first = tuple(at[0].tolist())
    return f"{case.name}: {len(at)} of {values.size}, first {values[first]} for {case.expected[first]} at {first}"
