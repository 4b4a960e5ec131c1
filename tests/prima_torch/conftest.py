"""Kernels of these tests run in Triton's interpreter, on CPU tensors: it must be told before Triton is imported."""

import os
from importlib.util import find_spec

os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = [] if find_spec("triton") else ["test_kernels_*"]  # Triton is there for Linux only
