"""Matrices that are written to again, and how bytes come to a GPU."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from prima_core.arch.slots import SlotOps
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_torch import staging
from prima_torch.cuda_ops import CudaOps
from prima_torch.ops import Matrix, TorchOps
from prima_torch.planes import empty, fill
from prima_torch.staging import Staging

CPU = torch.device("cpu")


def weight(type: GGUFType, shape: tuple[int, ...], seed: int) -> Weight:
    n_bytes = prod(shape) // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    data = np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)
    data.flags.writeable = False
    return Weight(f"w{seed}", type, shape, data)


def held(matrix: Matrix) -> list[bytes]:
    return [field.numpy().tobytes() for field in matrix.planes.fields.values()]


@pytest.mark.parametrize("kind", [TorchOps, CudaOps])
def test_ops_have_slots(kind: type[TorchOps]) -> None:
    assert isinstance(kind(CPU), SlotOps)


@pytest.mark.parametrize("type", BLOCKS)
@pytest.mark.parametrize("n_matrices", [(), (3,)])
def test_a_slot_takes_another_matrix_in_place(type: GGUFType, n_matrices: tuple[int, ...]) -> None:
    ops, shape = TorchOps(CPU), (*n_matrices, 5, 256)
    biases = [Weight("b", GGUFType.F32, (5,), np.full(5, n, np.float32).view(np.uint8)) for n in (1, 2)]
    slot = ops.matrix(weight(type, shape, 1), biases[0])
    places = [field.data_ptr() for field in slot.planes.fields.values()]
    other = ops.refill(slot, weight(type, shape, 2), biases[1])
    assert held(other) == held(ops.matrix(weight(type, shape, 2)))
    assert [field.data_ptr() for field in other.planes.fields.values()] == places
    assert other.bias is not None
    assert other.bias.tolist() == [2] * 5
    assert ops.refill(other, weight(type, shape, 1)).bias is None


@pytest.mark.parametrize("piece_bytes", [1, 2 * 144, 1 << 20])
def test_bytes_go_to_a_gpu_in_pieces_of_whole_rows(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", piece_bytes)
    source = weight(GGUFType.Q4_K, (7, 256), 3)
    planes, carrier = empty(GGUFType.Q4_K, 7, 256, CPU), Staging(CPU)
    rows = source.data.copy().reshape(7, 144)
    for start, data in carrier.pieces(rows):
        fill(planes, start, data)
    rows[:] = 0  # are the caller's again
    expected = TorchOps(CPU).matrix(source)
    assert held(Matrix(planes, 7)) == held(expected)


def test_a_piece_on_its_way_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the copy that was made two pieces ago, and for no other."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 4)
    log: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            log.append(f"wait {self.name}")

        def record(self, stream: object) -> None:
            log.append(f"copy {self.name}")

    carrier = Staging(CPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    carrier._fetched = [Event("a"), Event("b")]  # type: ignore[list-item]  # stand for CUDA's
    list(carrier.pieces(np.zeros((3, 4), np.uint8)))
    assert log == ["wait a", "copy a", "wait b", "copy b", "wait a", "copy a"]
