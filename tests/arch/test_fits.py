from __future__ import annotations

import pytest

from prima_core.arch.fits import check_fits, file_bytes
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import KvType, Layers, Slice, Weight
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
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
