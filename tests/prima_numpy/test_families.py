"""Whole models of every family: native kernels say what their twin says, to the bit, and rows have no company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.families import open_model
from prima_core.interfaces import BackendOptions, KvType, Layers, Slice
from prima_core.model.weights import Model
from prima_core.testing.driving import Visit, chunked, joined, logits_of_all, opened, step_of
from prima_core.testing.tinymodel import TinyModel, write_tiny_model
from prima_numpy.backend import DEVICE, NumpyBackend
from prima_numpy.kernels import Kernels
from prima_numpy.variants import VARIANT_VARIABLE
from tests.truth.cases import CASES, PROMPT_IDS

FloatArray = NDArray[np.float32]
MODELS: dict[str, tuple[TinyModel, KvType]] = {
    "gemma2": (replace(CASES["gemma2-4-heads-share-2"], types="Q8_0"), KvType.F16),
    "gemma3": (replace(CASES["gemma3-linear-rope"], types="Q4_1", head_dim=64), KvType.Q8_0),
    "mistral3": (replace(CASES["mistral3-yarn"], types="Q5_0"), KvType.Q8_0),
    "mixtral": (CASES["mixtral-q4_k_m"], KvType.Q8_0),
    "phi3 with a window": (replace(CASES["phi3-8-heads-share-2-window"], types="MXFP4"), KvType.F16),
    "phi3 with LongRoPE": (replace(CASES["phi3-long-rope-three-quarters-tied"], types="IQ4_NL"), KvType.Q8_0),
    "qwen3": (replace(CASES["qwen3-8-heads-share-2-of-48"], types="BF16"), KvType.F32),
    "qwen3moe": (CASES["qwen3moe-1-of-5-q8_0"], KvType.F16),
}


def visit(model: Model, kernels: str, kv_type: KvType) -> Visit:
    layers = Layers(0, model.spec.n_layers)
    part = Slice((layers,), has_input=True, has_output=True, kv_type=kv_type)
    return NumpyBackend(BackendOptions(2, kernels)).load(model.spec, DEVICE, part, model.store()), layers


def logits(where: Visit, sequence: int, chunk: int) -> FloatArray:
    return np.concatenate([logits_of_all([where], step) for step in chunked(sequence, PROMPT_IDS, chunk, capacity=99)])


@pytest.mark.parametrize("name", MODELS)
def test_native_has_the_bits_of_its_twin_in_any_chunks_and_company(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, kv_type = MODELS[name]
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", tiny)) as model:
        expected = logits(visit(model, "int8", kv_type), 0, chunk=64)
        for variant in Kernels.variants():
            monkeypatch.setenv(VARIANT_VARIABLE, variant)
            native = visit(model, "native", kv_type)
            for chunk in (1, 7, 64):
                np.testing.assert_array_equal(logits(native, chunk, chunk), expected)
            check_company(native, expected)


def check_company(native: Visit, expected: FloatArray) -> None:
    """The prompt of `expected` between two other texts, in prefill and in decoding."""
    first, last = step_of(70, PROMPT_IDS[9:39], kv=[opened(70)]), step_of(71, [3], kv=[opened(71)])
    prefill = joined(first, step_of(72, PROMPT_IDS[:33], kv=[opened(72)]), last)
    np.testing.assert_array_equal(logits_of_all([native], prefill)[30:63], expected[:33])
    decode = joined(step_of(71, [5], 1), step_of(72, PROMPT_IDS[33:34], 33), step_of(70, [8], 30))
    np.testing.assert_array_equal(logits_of_all([native], decode)[1], expected[33])
