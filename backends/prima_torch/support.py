"""What of torch works on this machine, and why the rest does not."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch

CUDA_BUILDS = "pip install torch --index-url https://download.pytorch.org/whl/cu128"
"""The line for builds with CUDA 12.8; pytorch.org/get-started names those for other versions."""


def cuda_fault() -> str:
    """Why no GPU can be used; "" where one can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # how torch says that a driver is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return _first_line(caught[0].message) if caught else "torch finds no GPU"


def cuda_hint(fault: str) -> str:
    """What to do about it."""
    if "built without" in fault:
        return f"for NVIDIA's GPUs: {CUDA_BUILDS}"
    if "too old" in fault:
        return "update the driver, or install a torch for an older CUDA (pytorch.org/get-started)"
    return ""


def triton_fault() -> str:
    """Why Triton's kernels cannot be used; "" where they can, on a GPU or (TRITON_INTERPRET=1) without."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return cuda_fault()


def _first_line(message: Warning | Exception | str) -> str:
    return str(message).strip().splitlines()[0]
