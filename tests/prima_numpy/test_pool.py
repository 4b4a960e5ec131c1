"""The thread pool of the native kernels, by checks of their own in C++: `pool/checks.cpp` says what each demands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "pool"


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    run("cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", str(folder))
    return folder / "checks"


def run(command: str, *arguments: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja lie beside Python
    program = shutil.which(command, path=path) or command
    environment = {**os.environ, "PATH": path}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "claim",
    [
        "runs_each_task_once",
        "goes_on_beside_a_slow_task",
        "uses_all_threads",
        "wakes_threads_on_other_cores",
        "keeps_the_cores_that_a_sleeping_thread_is_given",
        "serves_many_callers",
        "runs_tasks_of_tasks",
        "ends_awake_or_asleep",
    ],
)
def test_the_pool(checks: Path, claim: str) -> None:
    done = subprocess.run([checks, claim], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "")
