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
        is_gpu = device.type == "cuda"
        self._device = device
        self._staged = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(2)]
        self._fetched = [torch.cuda.Event() for _ in range(2)] if is_gpu else None  # type: ignore[no-untyped-call]  # torch has no types for it
        self._landed = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)

    def pieces(self, rows: NDArray[np.uint8]) -> Iterator[tuple[int, torch.Tensor]]:
        """The first of some rows [n, bytes], and their bytes on the device. Its work with them must be queued before
        the next are asked for. Raises ValueError for rows that are longer than a piece."""
        step = PIECE_BYTES // rows.shape[1]
        if not step:
            raise ValueError(f"a row of {rows.shape[1]} bytes is longer than a piece of {PIECE_BYTES}")
        for i, start in enumerate(range(0, len(rows), step)):
            yield start, self._carried(i % 2, rows[start : start + step])

    def _carried(self, i: int, rows: NDArray[np.uint8]) -> torch.Tensor:
        if self._fetched is not None:
            self._fetched[i].synchronize()
        self._staged[i].numpy()[: rows.size].reshape(rows.shape)[...] = rows
        landed = self._landed[: rows.size]
        landed.copy_(self._staged[i][: rows.size], non_blocking=True)
        if self._fetched is not None:
            self._fetched[i].record(torch.cuda.current_stream(self._device))
        return landed
