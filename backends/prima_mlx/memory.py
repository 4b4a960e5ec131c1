"""Which device MLX computes on, what memory it has there, and what becomes of its errors."""

from __future__ import annotations

import mlx.core as mx

from prima_core.errors import DeviceMemoryError
from prima_core.memory.system import host

CACHE_BYTES = 512 * 1024 * 1024
"""Freed buffers that MLX may keep for the next arrays of a pass; by default it would keep any number."""


def has_metal() -> bool:
    return mx.metal.is_available()


def has_gpu() -> bool:
    return has_metal() or mx.cuda.is_available()


def is_host_memory() -> bool:
    """Whether arrays lie where the host's processor can write to them: on a CPU, and in unified memory."""
    return has_metal() or not has_gpu()


def available_bytes() -> int:
    """What new arrays may take on the device now; buffers that MLX keeps for reuse count as free."""
    if has_gpu() and not has_metal():
        return _fact("free_memory") + mx.get_cache_memory()
    of_host = host().memory().available_bytes + mx.get_cache_memory()
    if not has_metal():
        return of_host
    # Metal slows down, or refuses, beyond what the system recommends: about three quarters of unified memory.
    return max(0, min(of_host, _fact("max_recommended_working_set_size") - mx.get_active_memory()))


def device_name() -> str:
    return str(mx.device_info().get("device_name", "unknown"))


def set_limits() -> None:
    """For the whole process: few buffers kept for reuse, and weights that the system does not take away between
    passes (macOS 15 on)."""
    mx.set_cache_limit(CACHE_BYTES)
    if has_metal():
        mx.set_wired_limit(_fact("max_recommended_working_set_size"))


def give_back() -> None:
    """What `set_limits` keeps."""
    mx.clear_cache()
    if has_metal():
        mx.set_wired_limit(0)


def evaluate(*arrays: mx.array) -> None:
    """Compute the arrays now. Raises DeviceMemoryError where there is no room."""
    try:
        mx.eval(*arrays)
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        raise no_room(str(error)) from error


def no_room(what: str) -> DeviceMemoryError:
    return DeviceMemoryError(f"mlx has no memory: {what}", hint="free memory, or use a smaller context (-c)")


def _fact(name: str) -> int:
    return int(mx.device_info()[name])
