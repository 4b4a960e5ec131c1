"""Whether the compiled module is there; apart from `kernels.py` so that a probe need not import numpy."""

from __future__ import annotations


def native_fault() -> str:
    """Why the native module cannot be used; empty when it can."""
    try:
        from prima_numpy import _kernels  # noqa: F401  (the import is the question)
    except ImportError as error:
        return f"the native module is not usable: {error}"
    return ""
