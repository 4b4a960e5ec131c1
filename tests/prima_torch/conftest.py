"""Tests of kernels are left out where there is no Triton: it exists for Linux only."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_kernels_*"]
