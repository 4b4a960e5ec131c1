"""Names and sizes of tensor types agree with the `gguf` package's table."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from prima_core.errors import ModelError
from prima_core.model.quant import BLOCKS, GGUFType, known_type, tensor_bytes, type_name


@pytest.mark.parametrize("theirs", list(GGMLQuantizationType))
def test_every_type_of_ggml_has_its_name(theirs: GGMLQuantizationType) -> None:
    assert type_name(theirs) == theirs.name


@pytest.mark.parametrize("type", list(GGUFType))
def test_blocks_are_as_large_as_ggml_says(type: GGUFType) -> None:
    assert (BLOCKS[type].n_weights, BLOCKS[type].n_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType(type)]


@pytest.mark.parametrize("number", [36, 38, 42, 2**32 - 1])
def test_a_number_that_is_no_type_is_shown_as_a_number(number: int) -> None:
    assert type_name(number) == f"number {number}"
    assert known_type(number) is None


def test_a_matrix_takes_its_blocks() -> None:
    assert tensor_bytes(GGUFType.Q4_K, (3, 512)) == 3 * 2 * 144
    assert tensor_bytes(GGUFType.F32, (7,)) == 28


@pytest.mark.parametrize("type", [type for type in GGUFType if BLOCKS[type].n_weights > 1])
def test_a_row_of_part_of_a_block_is_refused_by_name(type: GGUFType) -> None:
    block = BLOCKS[type].n_weights
    complaint = rf"^blk\.0\.x: rows of {block + 16} weights are no multiple of {type.name}'s blocks of {block}"
    with pytest.raises(ModelError, match=complaint):
        tensor_bytes(type, (2, block + 16), name="blk.0.x")
