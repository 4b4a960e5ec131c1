"""Whether a part of a model fits a device, and how much of it would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prima_core.arch.slots import Kind, kind, pieces
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Slice, Store, Weight
from prima_core.model.names import OUTPUT, TOKEN_EMBD
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

    `size`: bytes that a tensor takes on the device. Of streamed tensors there are as many at once as `arch.slots` says.
    """
    ends = _end_bytes(model, part, store, size)
    kv = 2 * model.n_kv_heads * kv_row_bytes(part.kv_type, model.head_dim) * part.kv_tokens
    layers = [layer for layers in part.layers for layer in layers]
    totals = [ends + n_bytes for n_bytes in _layer_bytes(layers, kv, store, size)]
    if totals[-1] <= available_bytes:
        return
    n_fit = sum(total <= available_bytes for total in totals) - 1
    what = f"{len(layers)} layers" + (" with input and output part" if ends else "")
    would = f"{max(n_fit, 0)} of the layers would fit" if n_fit >= 0 else "not even these parts alone fit"
    raise DeviceMemoryError(
        f"{what} need {_size(totals[-1])} on {device}, which has {_size(available_bytes)} available: {would}",
        hint="free memory, add a node, lower --memory, use a shorter context (-c) or a more quantised model",
    )


def _layer_bytes(layers: list[int], kv: int, store: Store, size: Callable[[Weight], int]) -> Iterator[int]:
    """What the first n of the layers take, from none to all."""
    kept, slots, sizes = 0, Counter[Kind](), dict[Kind, int]()
    yield kept
    for layer in layers:
        streamed = Counter[Kind]()
        for weight in store.views(layer).values():
            if store.is_streamed(weight.name):
                streamed[kind(weight)] += 1
                sizes[kind(weight)] = size(weight)
            else:
                kept += size(weight)
        kept += kv
        slots |= streamed  # of each kind as many as the layer with the most
        yield kept + sum(n * sizes[kind] for kind, n in slots.items())


def _end_bytes(model: ModelSpec, part: Slice, store: Store, size: Callable[[Weight], int]) -> int:
    shared = store.shared()
    held = {name: shared[name] for name in end_tensors(model, part)}
    streamed = {name for name in held if store.is_streamed(name)}
    n_bytes = sum(size(weight) for name, weight in held.items() if name not in streamed)
    output = TOKEN_EMBD if model.tied_output else OUTPUT
    if part.has_output and output in streamed:
        n_bytes += size(next(pieces(held[output])))
    return n_bytes


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
