"""What of torch works on this machine, and why the rest does not: found out without torch, which takes seconds to
import."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

CUDA_BUILDS = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
"""The line for builds with CUDA 13.0; pytorch.org/get-started has those for other versions."""

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Support:
    """The installed torch and NVIDIA's driver. `cuda`: what torch was built for; None: the CPU, or GPUs that `others`
    names. `driver`: the newest CUDA that the driver can do, or why it cannot be used."""

    torch: str
    cuda: Version | None
    driver: Version | str
    others: str = ""

    @property
    def fault(self) -> str:
        """Why no GPU can be used; "" where one can."""
        if self.others:
            # torch for ROCm has CUDA's names (see its notes on HIP), but nothing of ours was ever run on that.
            return f"torch {self.torch} was built for {self.others}, which prima does not use"
        if self.cuda is None:
            return f"torch {self.torch} was built without CUDA"
        if isinstance(self.driver, str):
            return self.driver
        if self.driver[0] < self.cuda[0]:
            return f"the driver is too old: it can do CUDA {_dotted(self.driver)}, torch needs {_dotted(self.cuda)}"
        return ""

    @property
    def hint(self) -> str:
        """What to do about the fault."""
        if self.others:
            return f"compute on the CPU, where numpy:cpu is quicker; for NVIDIA's GPUs: {CUDA_BUILDS}"
        if self.cuda is None:
            return "" if sys.platform == "darwin" else f"for NVIDIA's GPUs: {CUDA_BUILDS}"
        is_old = not isinstance(self.driver, str) and self.fault
        return "update the driver, or install a torch for an older CUDA: pytorch.org/get-started" if is_old else ""

    @property
    def triton_fault(self) -> str:
        """Why Triton's kernels cannot be used; "" where they can: on a GPU, and in its interpreter (for tests)."""
        if find_spec("triton") is None:
            return "triton is not installed"
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else self.fault or _compiler_fault()

    def describe(self) -> str:
        """The CUDA that is used, or why none is."""
        if self.fault or self.cuda is None or isinstance(self.driver, str):
            return f"none: {self.fault}"
        return f"{_dotted(self.cuda)}, the driver can do {_dotted(self.driver)}"


def look() -> Support | None:
    """None where torch is not installed."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    facts = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))
    cuda = facts["cuda"] and tuple(map(int, facts["cuda"].split(".")[:2]))
    others = "AMD's GPUs (ROCm)" if facts.get("hip") else "Intel's GPUs (XPU)" if facts.get("xpu") else ""
    return Support(str(facts["__version__"]), cuda, _driver(), others)


def _driver() -> Version | str:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no driver for NVIDIA's GPUs"
    error, number = driver.cuInit(0), ctypes.c_int()
    if error or driver.cuDriverGetVersion(ctypes.byref(number)):
        return f"NVIDIA's driver finds no GPU that it can use (error {error})"
    return number.value // 1000, number.value % 1000 // 10


def _compiler_fault() -> str:
    """Triton builds what launches kernels by a C compiler (`triton/runtime/build.py`); on Windows it comes with one."""
    if sys.platform == "win32":
        return ""
    if "CC" not in os.environ and not any(map(which, ("gcc", "clang"))):
        return "triton needs a C compiler, and there is no gcc"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    return "" if header.exists() else f"triton needs Python's header files, and there is no {header}"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
