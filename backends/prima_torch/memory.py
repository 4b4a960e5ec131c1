"""A device's memory: what is free, and what its lack is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prima_core.errors import DeviceMemoryError
from prima_core.memory.system import host

RESERVE_BYTES = 768 << 20
"""Of a GPU's free memory, kept for what a pass needs: weights dequantised for prefill, activations, the workspaces of
cuBLAS, captured graphs."""


def available_bytes(device: torch.device) -> int:
    """What weights and KV may take now."""
    if device.type == "cpu":
        return host().memory().available_bytes
    return max(0, torch.cuda.mem_get_info(device)[0] - RESERVE_BYTES)


_LACKS = (
    "not enough memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate: on the CPU, in cuBLAS and in Triton that is a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _LACKS)
    )


def give_back(device: torch.device) -> None:
    """What torch keeps of memory that is not in use goes back to the device, whose free memory is else too small."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def room_for(what: str, hint: str) -> Iterator[None]:
    """Translates a failed allocation into DeviceMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        raise DeviceMemoryError(f"no memory for {what}", hint=hint) from error
