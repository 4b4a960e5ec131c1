from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prima_core.arch.rope import rope_angles, rope_factors, rope_frequencies
from prima_core.errors import ModelError
from prima_core.interfaces import Chunk
from prima_core.model.facts import Facts, Scalar
from prima_core.model.header import Value
from prima_core.model.names import ROPE_LONG, ROPE_SHORT
from prima_core.model.rope import RopeSpec, Yarn, read_rope
from tests.arch.small import f32_weight

Double = NDArray[np.float64]


def test_frequencies_fall_from_one_to_nearly_one_over_theta() -> None:
    frequencies = rope_frequencies(RopeSpec(4, theta=10000.0), None)
    np.testing.assert_allclose(frequencies, [1, 0.01])


def test_scaling_divides_frequencies() -> None:
    rope = RopeSpec(4, theta=10000.0, factor=2.0)
    np.testing.assert_allclose(rope_frequencies(rope, np.array([1, 8], np.float32)), [1 / 2, 0.01 / 2 / 8])


def test_each_chunk_counts_from_its_own_start() -> None:
    angles = rope_angles(np.array([1.0, 0.5]), [Chunk(0, 3, 2), Chunk(9, 0, 1)])
    np.testing.assert_array_equal(angles, [[3, 1.5], [4, 2], [0, 0]])


def test_a_far_position_keeps_its_angle_to_float32() -> None:
    angles = rope_angles(np.array([np.pi * 2]), [Chunk(0, 100_000, 1)])
    assert abs(np.sin(angles[0, 0])) < 1e-9


# ---------------------------------------------------------------- scaled ropes, against transformers


def of_transformers(kind: str, dim: int, context: int, parameters: dict[str, Any]) -> tuple[Double, float]:
    """Frequencies [dim / 2] and the factor of cosines and sines. LongRoPE: those of a sequence of `context`."""
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=context)
    return frequencies.double().numpy(), amplitude


def read(keys: dict[str, Scalar], dim: int, tensors: tuple[str, ...] = ()) -> RopeSpec:
    metadata: dict[str, Value] = {f"llama.{key}": value for key, value in keys.items()}
    return read_rope(Facts(metadata, "llama", {}), dim, 4096, tensors)


YARN: dict[str, tuple[dict[str, Scalar], dict[str, float]]] = {
    "defaults": ({}, {}),
    "other ramp": (
        {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
        {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "attention factor": ({"rope.scaling.yarn_attn_factor": 1.5}, {"attention_factor": 1.5}),
    "mscale": ({"rope.scaling.yarn_log_multiplier": 0.7}, {"mscale": 1.0, "mscale_all_dim": 0.7}),
    "mscale of all dims": ({"rope.scaling.yarn_log_multiplier": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
}


@pytest.mark.parametrize("variant", YARN)
@pytest.mark.parametrize("factor", [4.0, 40.0])
@pytest.mark.parametrize("original", [16, 1024, 32768])
@pytest.mark.parametrize("dim", [4, 64, 96])
def test_yarn_is_that_of_transformers(variant: str, factor: float, original: int, dim: int) -> None:
    own, theirs = YARN[variant]
    scaling: dict[str, Scalar] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    rope = read(scaling | own, dim)
    parameters = {"factor": factor, "original_max_position_embeddings": original, **theirs}
    frequencies, amplitude = of_transformers("yarn", dim, 4096, parameters)
    np.testing.assert_allclose(rope_frequencies(rope, None), frequencies, rtol=1e-5)
    assert rope.amplitude == pytest.approx(amplitude)


def test_yarn_spares_fast_frequencies_and_divides_slow_ones() -> None:
    rope = RopeSpec(64, 10000.0, factor=4.0, yarn=Yarn(1024))
    ratio = rope_frequencies(RopeSpec(64, 10000.0), None) / rope_frequencies(rope, None)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(4)
    assert np.all(np.diff(ratio) >= 0)
    assert np.count_nonzero((ratio > 1.01) & (ratio < 3.99)) > 5


@pytest.mark.parametrize("context", [100, 1024, 1025, 4096])
def test_longrope_is_that_of_transformers(context: int) -> None:
    long, short = np.linspace(1, 9, 8, dtype=np.float32), np.linspace(1, 2, 8, dtype=np.float32)
    shared = {name: f32_weight(name, values) for name, values in ((ROPE_LONG, long), (ROPE_SHORT, short))}
    amplitude = float(np.sqrt(1 + np.log(4) / np.log(1024)))  # so converters write it
    keys: dict[str, Scalar] = {
        "rope.scaling.original_context_length": 1024,
        "rope.scaling.attn_factor": amplitude,
    }
    rope = read(keys, 16, (ROPE_LONG, ROPE_SHORT))
    parameters = {
        "original_max_position_embeddings": 1024,
        "factor": 4.0,
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
    }
    frequencies, their_amplitude = of_transformers("longrope", 16, context, parameters)
    np.testing.assert_allclose(rope_frequencies(rope, rope_factors(rope, shared, context)), frequencies, rtol=1e-5)
    assert rope.amplitude == pytest.approx(their_amplitude)


@pytest.mark.parametrize("tensors", [(), (ROPE_LONG,), (ROPE_SHORT,)])
def test_longrope_needs_both_of_its_tensors(tensors: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="LongRoPE needs") as caught:
        read({"rope.scaling.type": "longrope"}, 16, tensors)
    assert caught.value.field == "llama.rope.scaling.type"


def test_longrope_with_another_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match="'yarn', but the file has LongRoPE's"):
        read({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, 16, (ROPE_LONG, ROPE_SHORT))


def test_a_ramp_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ModelError, match="yarn_beta_slow: is 64, not less than yarn_beta_fast 32"):
        read({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_slow": 64.0}, 16)


@pytest.mark.parametrize(
    "key", ["rope.freq_base", "factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor", "yarn_log_multiplier"]
)
@pytest.mark.parametrize("value", [5e-324, -1.0, np.nan, np.inf])
def test_a_number_that_angles_cannot_be_made_of_is_refused_by_its_key(key: str, value: float) -> None:
    name = key if "." in key else f"rope.scaling.{key}"
    with pytest.raises(ModelError) as caught:
        read({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, name: value}, 16)
    assert caught.value.field == f"llama.{name}"
