"""The parts of bench/gpu.py, for its processes: where they run, and what becomes of an error in one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Row = dict[str, object]
"""A line of a table. `right`: False fails the part."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`limits`: what the part `machine` measured, by name; empty where it did not come to that."""

    tiny: bool
    profile: bool
    limits: dict[str, float]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda:0")

    def share(self, value: float, limit: str) -> float | None:
        return value / self.limits[limit] if limit in self.limits else None

    def wait(self) -> None:
        """Until the device has done all that was queued."""
        if not self.tiny:
            torch.cuda.synchronize()

    def best_s(self, action: Callable[[], object], repeats: int = 5) -> float:
        """Shortest time of `action`, by the host's clock: it should take milliseconds at least."""
        best = float("inf")
        for _ in range(1 if self.tiny else repeats):
            self.wait()
            start = time.perf_counter()
            action()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best


def part_said(part: str, settings: Settings) -> Iterator[tuple[str, dict[str, object]]]:
    """Run a part, `name` or `name:TYPE,TYPE`: ("row", row) for each as it is there, then ("end", how it ended), with
    its error if it has one."""
    error, start, right = "", time.perf_counter(), True
    try:
        for row in _rows(part, settings):
            right = right and bool(row.get("right", True))
            yield "row", row
    except Exception as problem:  # noqa: BLE001  # reported, and it makes the part fail
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    yield "end", {"right": right and not error, "seconds": time.perf_counter() - start, "error": error}


def _rows(part: str, settings: Settings) -> Iterator[Row]:
    """Imported here, so that what is broken in one part does not keep the others from running."""
    name, _, types = part.partition(":")
    if name == "linear":
        from bench.gpu_linear import linear

        return linear(types.split(","), settings)
    if name in ("attention", "ops", "graphs"):
        from bench import gpu_checks

        return {"attention": gpu_checks.attention, "ops": gpu_checks.ops, "graphs": gpu_checks.graphs}[name](settings)
    if name == "machine":
        from bench.gpu_machine import machine

        return machine(settings)
    from bench import gpu_speed

    if name == "compile":
        return gpu_speed.compiled(types.split(","), settings)
    return {"kernels": gpu_speed.kernels, "model": gpu_speed.model}[name](settings)
