"""Norms, rope and gates in Triton's interpreter: near the numpy backend's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prima_core.arch.rope import Rope
from prima_core.model.rope import RopeKind
from prima_numpy.ops import ReferenceOps, exact_product
from prima_torch.kernels import elementwise

REFERENCE = ReferenceOps(exact_product)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows as part of wider ones."""
    wide = torch.full((len(rows), rows.shape[1] + 11), torch.nan)
    wide[:, 5:-6] = rows
    return wide[:, 5:-6]


def close(actual: torch.Tensor, expected: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "run"), [(1, 1), (15, 15), (1000, 1000), (96, 32), (240, 80)])
def test_rms_norm_is_that_of_numpy(width: int, run: int) -> None:
    x, gain = random(3, width), random(run, seed=2)
    close(elementwise.rms_norm(x, gain, 1e-5), REFERENCE.rms_norm(x.numpy(), gain.numpy(), 1e-5))
    assert torch.equal(elementwise.rms_norm(apart(x), gain, 1e-5), elementwise.rms_norm(x, gain, 1e-5))


def test_rms_norm_of_zeros_is_zero_and_of_nan_is_nan() -> None:
    normed = elementwise.rms_norm(torch.tensor([[0.0, 0], [torch.nan, 1]]), torch.ones(2), 1e-5)
    np.testing.assert_array_equal(normed.numpy(), [[0, 0], [np.nan, np.nan]])


@pytest.mark.parametrize("kind", RopeKind)
@pytest.mark.parametrize(("head_dim", "n_pairs"), [(8, 4), (80, 40), (20, 5), (64, 16)])
def test_rope_turns_as_numpy_does_in_place(kind: RopeKind, head_dim: int, n_pairs: int) -> None:
    x, angles = random(3, 2 * head_dim), random(3, n_pairs, seed=2)
    rope = Rope(kind, head_dim, 1.25 * angles.cos(), 1.25 * angles.sin())
    expected = REFERENCE.rope(x.numpy().copy(), Rope(kind, head_dim, rope.cos.numpy(), rope.sin.numpy()))
    wide = apart(x)
    assert elementwise.rope(wide, rope) is wide
    close(wide, expected)


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gates_are_those_of_numpy_in_place(name: str) -> None:
    gate, up = 4 * random(2, elementwise.BLOCK + 30), random(2, elementwise.BLOCK + 30, seed=2)
    gate[0, :4] = torch.tensor([0, -200, 200, 1e-8])
    expected = getattr(REFERENCE, name)(gate.numpy().copy(), up.numpy())
    wide = apart(gate)
    assert getattr(elementwise, name)(wide, apart(up)) is wide
    close(wide, expected)
