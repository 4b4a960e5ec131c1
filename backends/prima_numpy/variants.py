"""Which variant of the native kernels runs here; apart from `kernels.py` so that a probe need not import numpy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prima_core.errors import ConfigError
from prima_numpy.threads import default_threads

if TYPE_CHECKING:
    from prima_numpy import _kernels

VARIANT_VARIABLE = "PRIMA_CPU"
ALL_VARIANTS = (
    *("portable", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"),
    *("neon", "neon_dotprod", "neon_i8mm"),
)
"""What there is on some CPU; `Kernels.variants()` are those of this one."""


def asked_variant() -> str:
    """What the user's environment asks for, or "auto"."""
    return os.environ.get(VARIANT_VARIABLE) or "auto"


def open_engine(threads: int, variant: str) -> _kernels.Engine:
    """The native kernels of one variant with a pool of threads.

    Raises ConfigError for a variant that does not exist or cannot run here, and for threads that do not start.
    """
    from prima_numpy import _kernels

    choices = ("auto", *_kernels.variants())
    if variant not in choices:
        lacking = f"CPU variant {variant!r} needs instructions that this CPU, its system or this build lacks"
        raise ConfigError(
            lacking if variant in ALL_VARIANTS else f"there is no CPU variant {variant!r}", hint=_hint(choices)
        )
    try:
        return _kernels.Engine(threads, variant)
    except ValueError as error:
        raise ConfigError(str(error), hint="set fewer by -t or PRIMA_THREADS, or end other programs") from error
    except RuntimeError as error:
        # The system does not grant what the CPU has.
        raise ConfigError(str(error), hint=_hint(name for name in choices if name != variant)) from error


def summary() -> str:
    """What the native kernels would be here, in a line. Raises ConfigError as `open_engine` does."""
    from prima_numpy import _kernels

    chosen = open_engine(1, asked_variant()).variant
    return f"native, {chosen}, {default_threads()} threads; can run: {' '.join(_kernels.variants())}"


def _hint(choices: Iterable[str]) -> str:
    return f"leave {VARIANT_VARIABLE} unset for the best, or set it to one of: {', '.join(choices)}"
