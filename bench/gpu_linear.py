"""bench/gpu.py: products with matrices of every type, against the numpy reference in float64."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu_parts import Row, Settings
from bench.gpu_weights import random_weight
from prima_core.interfaces import Weight
from prima_core.model.quant import GGUFType
from prima_numpy.quant import dequantize
from prima_torch.kernels.linear import dequantize as dequantize_planes
from prima_torch.kernels.linear import matvec, matvec_experts
from prima_torch.planes import Planes, split

EXACT, ROUNDED, CUT = 1e-4, 2**-8, 2**-7
"""Largest errors, as parts of the largest right value: of sums in float32, of values rounded to bf16, and of values cut
to it, as Triton's interpreter does."""


def linear(types: Sequence[str], settings: Settings) -> Iterator[Row]:
    for name in types:
        start = time.perf_counter()
        try:
            row = _type(GGUFType[name], settings)
        except Exception as problem:  # noqa: BLE001  # the other types are tried too
            yield {"type": name, "right": False, "problem": f"{type(problem).__name__}: {problem}"}
        else:
            yield {"type": name, **row, "s": time.perf_counter() - start}


def _type(type: GGUFType, settings: Settings) -> Row:
    shapes = [(9, 256)] if settings.tiny else [(1000, 4096), (96, 14336)]  # few rows of many columns: split sums
    products: list[float] = []
    tensors: list[float] = []
    roundings: list[float] = []
    same = True
    for shape in shapes:
        weight = random_weight(type, shape)
        matrix = planes(weight, settings.device)
        exact = dequantize(type, weight.data, shape).astype(np.float64)
        error, same_bits = _products(matrix, exact, settings)
        products.append(error)
        same = same and same_bits
        for dtype, errors in ((torch.float32, tensors), (torch.bfloat16, roundings)):
            errors.append(_dequantized(matrix, exact, dtype))
    experts = _experts(type, settings)
    right = (
        same and max(*products, *tensors, experts) <= EXACT and max(roundings) <= (CUT if settings.tiny else ROUNDED)
    )
    return {
        "right": right, "product": max(products), "same bits for 1..8": same, "experts": experts,
        "dequantised": max(tensors), "to bf16": max(roundings),
    }  # fmt: skip


def _products(matrix: Planes, exact: NDArray[np.float64], settings: Settings) -> tuple[float, bool]:
    """The worst error for 1 to 8 tokens, and whether a token's bits are the same in any company."""
    rng = np.random.default_rng(1)
    x, bias = rng.standard_normal((8, exact.shape[1]), np.float32), rng.standard_normal(len(exact), np.float32)
    on_device, bias_there = torch.from_numpy(x).to(settings.device), torch.from_numpy(bias).to(settings.device)
    counts = (1, 8) if settings.tiny else range(1, 9)
    answers = {n: matvec(on_device[:n], matrix, bias_there).cpu().numpy() for n in counts}
    right = x @ exact.T + bias
    worst = max(relative(answer, right[:n]) for n, answer in answers.items())
    return worst, all(np.array_equal(answer, answers[8][:n]) for n, answer in answers.items())


def _experts(type: GGUFType, settings: Settings) -> float:
    n_experts, outputs, columns = (2, 4, 256) if settings.tiny else (6, 96, 2048)
    weight = random_weight(type, (n_experts * outputs, columns), "experts")
    exact = dequantize(type, weight.data, weight.shape).astype(np.float64).reshape(n_experts, outputs, columns)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2 if settings.tiny else 5, columns), np.float32)
    chosen = rng.integers(0, n_experts, len(x))
    there = torch.from_numpy(chosen.astype(np.int32)).to(settings.device)
    answer = matvec_experts(
        torch.from_numpy(x).to(settings.device), planes(weight, settings.device), outputs, there
    )  # fmt: skip
    return relative(answer.cpu().numpy(), np.einsum("nc,noc->no", x, exact[chosen]))


def _dequantized(matrix: Planes, exact: NDArray[np.float64], dtype: torch.dtype) -> float:
    """Rows from the middle on, and all."""
    device = next(iter(matrix.fields.values())).device
    errors = []
    for first in (0, len(exact) // 2):
        out = torch.full((len(exact) - first, exact.shape[1]), torch.nan, dtype=dtype, device=device)
        dequantize_planes(matrix, out, first)
        errors.append(relative(out.float().cpu().numpy(), exact[first:]))
    return max(errors)


def planes(weight: Weight, device: torch.device) -> Planes:
    rows, columns = weight.shape
    return split(weight.type, rows, columns, torch.from_numpy(weight.data.copy()).to(device))


def relative(found: NDArray[np.float32], right: NDArray[np.float64]) -> float:
    """The largest difference as a part of the largest right value; infinite where something is no number."""
    difference = np.abs(found - right).max()
    return float(difference / np.abs(right).max()) if np.isfinite(difference) else float("inf")
