from __future__ import annotations

from collections.abc import Callable

import pytest

from prima_core.arch import slots
from prima_core.arch.fits import check_fits, file_bytes
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import KvType, Layers, Slice, Weight
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from prima_core.testing.streaming import PoisonedStore
from tests.arch.small import small_model, small_spec

MODEL = small_model(small_spec())
STORE = MODEL.store()
LAYER = sum(map(file_bytes, STORE.views(0).values()))
ENDS = sum(file_bytes(STORE.shared()[name]) for name in (TOKEN_EMBD, OUTPUT_NORM, OUTPUT))
KV = 2 * MODEL.spec.n_kv_heads * MODEL.spec.head_dim * 2  # bytes of a position in a layer, f16
WHOLE = Slice((Layers(0, 2), Layers(2, 3)), has_input=True, has_output=True, kv_type=KvType.F16, kv_tokens=10)
NEEDED = ENDS + 3 * (LAYER + 10 * KV)


def test_a_part_that_just_fits_passes() -> None:
    check_fits("torch:cuda:0", NEEDED, MODEL.spec, WHOLE, STORE)
    assert not STORE.log  # nothing was read for it


@pytest.mark.parametrize(
    ("available", "says"),
    [
        (NEEDED - 1, "2 of the layers would fit"),
        (NEEDED - (LAYER + 10 * KV) - 1, "1 of the layers would fit"),
        (ENDS, "0 of the layers would fit"),
        (ENDS - 1, "not even these parts alone fit"),
    ],
)
def test_the_error_names_how_many_layers_would_fit(available: int, says: str) -> None:
    with pytest.raises(DeviceMemoryError, match=f"3 layers with input and output part .* torch:cuda:0.*{says}"):
        check_fits("torch:cuda:0", available, MODEL.spec, WHOLE, STORE)


def test_tensors_count_as_large_as_they_are_on_the_device() -> None:
    def twice(weight: Weight) -> int:
        return 2 * file_bytes(weight)

    check_fits("mlx:gpu", 6 * LAYER, MODEL.spec, Slice((Layers(0, 3),)), STORE, size=twice)
    with pytest.raises(DeviceMemoryError, match="3 layers need"):
        check_fits("mlx:gpu", 6 * LAYER - 1, MODEL.spec, Slice((Layers(0, 3),)), STORE, size=twice)


# ---------------------------------------------------------------- a store that streams


def _needed(streams: Callable[[str], bool], part: Slice = WHOLE) -> int:
    """The least memory in which the part fits."""
    store = PoisonedStore(STORE, streams)
    fitting = 0
    for bit in reversed(range(20)):
        try:
            check_fits("torch:cuda:0", fitting + (1 << bit) - 1, MODEL.spec, part, store)
        except DeviceMemoryError:
            fitting += 1 << bit
    return fitting


def test_of_streamed_tensors_only_those_of_a_layer_count() -> None:
    layers, gate = Slice((Layers(0, 3),)), file_bytes(STORE.views(0)["ffn_gate.weight"])
    assert _needed(lambda name: False) == NEEDED
    assert _needed(lambda name: name.startswith("blk.1."), layers) == 3 * LAYER
    assert _needed(lambda name: name.startswith("blk."), layers) == LAYER
    assert _needed(lambda name: "ffn_gate" in name or "ffn_up" in name, layers) == 3 * LAYER - 4 * gate
    assert _needed(lambda name: name in ("blk.0.ffn_gate.weight", "blk.2.ffn_up.weight"), layers) == 3 * LAYER - gate


def test_of_streamed_ends_a_piece_of_the_output_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Slice((), has_input=True, has_output=True)
    embedding, norm, output = (file_bytes(STORE.shared()[name]) for name in (TOKEN_EMBD, OUTPUT_NORM, OUTPUT))
    assert _needed(lambda name: name == TOKEN_EMBD, ends) == norm + output
    monkeypatch.setattr(slots, "PIECE_BYTES", output // 5)
    assert _needed(lambda name: name == OUTPUT, ends) == embedding + norm + output // 5


def test_streamed_layers_are_named_as_fitting_too() -> None:
    store = PoisonedStore(STORE, lambda name: name.startswith("blk.") and not name.startswith("blk.2."))
    part = Slice((Layers(0, 3),))
    check_fits("torch:cuda:0", 2 * LAYER, MODEL.spec, part, store)
    with pytest.raises(DeviceMemoryError, match="2 of the layers would fit"):
        check_fits("torch:cuda:0", 2 * LAYER - 1, MODEL.spec, part, store)
