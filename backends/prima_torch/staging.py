"""Bytes on their way to a GPU, by way of memory that it can read itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

PIECE_BYTES = 8 << 20


class Staging:
    """Two pieces of the host's memory, pinned for a GPU, and one of the device's, where what arrives waits to be used.

    While the GPU fetches a piece the next is copied to the other one: so the caller's bytes are his again as soon as
    the last piece is handed out, and nobody waits for the GPU unless it is slower than the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetched: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._fetched = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # torch has none
        self._allocate(PIECE_BYTES)

    def pieces(self, rows: NDArray[np.uint8]) -> Iterator[tuple[int, torch.Tensor]]:
        """The first of some rows [n, bytes], and their bytes on the device. Its work with them must be queued before
        the next are asked for."""
        if rows.shape[1] > len(self._landed):
            self._allocate(rows.shape[1])
        step = len(self._landed) // rows.shape[1]
        for i, start in enumerate(range(0, len(rows), step)):
            yield start, self._carried(i % 2, rows[start : start + step])

    def _allocate(self, n_bytes: int) -> None:
        is_gpu = self._device.type == "cuda"
        self._staged = [torch.empty(n_bytes, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(2)]
        self._landed = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def _carried(self, i: int, rows: NDArray[np.uint8]) -> torch.Tensor:
        if self._fetched:
            self._fetched[i].synchronize()
        self._staged[i].numpy()[: rows.size].reshape(rows.shape)[...] = rows
        landed = self._landed[: rows.size]
        landed.copy_(self._staged[i][: rows.size], non_blocking=True)
        if self._fetched:
            self._fetched[i].record(torch.cuda.current_stream(self._device))
        return landed
