"""bench/gpu.py: what the GPU can do, by torch alone: what everything else is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu_parts import Row, Settings

READ, BF16 = "GB/s read", "bf16 TFLOP/s"


def machine(settings: Settings) -> Iterator[Row]:
    name = "CPU" if settings.tiny else torch.cuda.get_device_name(settings.device)
    yield {"what": f"{name}, torch {torch.__version__}", "best": None}
    yield {"what": READ, "best": _read_bytes_per_s(settings) / 1e9}
    yield {"what": BF16, "best": _bf16_flop_per_s(settings) / 1e12}


def _read_bytes_per_s(settings: Settings) -> float:
    """The better of adding up a large array and copying it (which reads half of the bytes that it moves)."""
    n_bytes = 1 << (22 if settings.tiny else 32)
    source = torch.ones(n_bytes // 4, dtype=torch.float32, device=settings.device)
    target = torch.empty_like(source)
    source.sum()  # loads the kernel
    adding_s = settings.best_s(lambda: source.sum(), 10)
    copying_s = settings.best_s(lambda: target.copy_(source), 10)
    return max(n_bytes / adding_s, 2 * n_bytes / copying_s)


def _bf16_flop_per_s(settings: Settings) -> float:
    n, times = (64, 1) if settings.tiny else (8192, 5)
    a, b = torch.randn((2, n, n), device=settings.device, dtype=torch.float32).bfloat16()

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b)

    products()
    return 2 * n**3 * times / settings.best_s(products)
