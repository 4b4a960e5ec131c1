"""Whether a part of a model fits a device, and how much of it would."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Slice, Store, Weight
from prima_core.model.quant import kv_row_bytes
from prima_core.model.spec import ModelSpec
from prima_core.model.weights import end_tensors


def file_bytes(weight: Weight) -> int:
    """What a tensor takes where it is held as in the file."""
    return weight.data.nbytes


def check_fits(
    device: str,
    available_bytes: int,
    model: ModelSpec,
    part: Slice,
    store: Store,
    size: Callable[[Weight], int] = file_bytes,
) -> None:
    """Raise DeviceMemoryError, with the number of layers that would fit, unless weights and `part.kv_tokens` do.

    `size`: bytes that a tensor takes on the device.
    """
    shared = store.shared()
    ends = sum(size(shared[name]) for name in end_tensors(model, part))
    kv = 2 * model.n_kv_heads * kv_row_bytes(part.kv_type, model.head_dim) * part.kv_tokens
    layers = [sum(map(size, store.views(layer).values())) + kv for layers in part.layers for layer in layers]
    needed = ends + sum(layers)
    if needed <= available_bytes:
        return
    n_fit = sum(total <= available_bytes for total in accumulate(layers, initial=ends)) - 1
    what = f"{len(layers)} layers" + (" with input and output part" if ends else "")
    would = f"{max(n_fit, 0)} of the layers would fit" if n_fit >= 0 else "not even these parts alone fit"
    raise DeviceMemoryError(
        f"{what} need {_size(needed)} on {device}, which has {_size(available_bytes)} available: {would}",
        hint="free memory, add a node, lower --memory, use a shorter context (-c) or a more quantised model",
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
