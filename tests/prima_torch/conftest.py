"""Kernels of these tests run in Triton's interpreter, on CPU tensors: it must be told before Triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
