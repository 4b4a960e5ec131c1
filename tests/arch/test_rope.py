import numpy as np

from prima_core.arch.rope import rope_angles, rope_frequencies
from prima_core.interfaces import Chunk
from prima_core.model.rope import RopeSpec


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
