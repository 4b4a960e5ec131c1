"""GGUF's blocks as MLX's groups, to the same weights: repacked, never requantised.

MLX's affine groups hold 32 unsigned codes of 2 to 8 bits, bit after bit from the lowest, and are worth
scale * code + bias. Every quantised type fits that form without rounding where scale and bias are float32, because a
GGUF weight is d * s * code - dmin * m with small integers s and m: products that float16, of 11 bits, could not hold.
Types with an s for each 16 codes get two sets of scales and biases, one for the even and one for the odd sixteens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.model.unpack import UNPACK, Bytes, Codes, Float32s
from prima_mlx.repack import REPACK, Scratch

GROUP = 32
PIECE_WEIGHTS = 1 << 19
"""So many weights are repacked at once: what that takes besides, a few bytes for each, about stays in a core's own
cache. More threads would be slower: numpy's steps are so short that the threads wait for the interpreter."""
COPIED_WEIGHTS = 1 << 22
"""Of a tensor whose room on the device the host cannot write to."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Codes of `bits`, `offset` above those of the file. `sets` of scales: 2 where sixteen codes share one.

    `mode` is MLX's: affine, or mxfp4, whose scales are the bytes of the file and which has no biases.
    """

    bits: int
    offset: int
    sets: int = 1
    mode: str = "affine"


# Offsets are powers of two, so that scale * offset, the bias, is exact too.
PACKINGS: Mapping[GGUFType, Packing] = MappingProxyType(
    {
        GGUFType.Q4_0: Packing(4, 8),
        GGUFType.Q4_1: Packing(4, 0),
        GGUFType.Q5_0: Packing(5, 16),
        GGUFType.Q5_1: Packing(5, 0),
        GGUFType.Q8_0: Packing(8, 128),
        GGUFType.Q2_K: Packing(2, 0, sets=2),
        GGUFType.Q3_K: Packing(3, 4, sets=2),
        GGUFType.Q4_K: Packing(4, 0),
        GGUFType.Q5_K: Packing(5, 0),
        GGUFType.Q6_K: Packing(6, 32, sets=2),
        GGUFType.IQ1_S: Packing(5, 16),
        GGUFType.IQ1_M: Packing(5, 16, sets=2),
        GGUFType.IQ2_XXS: Packing(8, 128),
        GGUFType.IQ2_XS: Packing(8, 128, sets=2),
        GGUFType.IQ2_S: Packing(8, 128, sets=2),
        GGUFType.IQ3_XXS: Packing(8, 128),
        GGUFType.IQ3_S: Packing(5, 16),
        GGUFType.IQ4_NL: Packing(8, 128),
        GGUFType.IQ4_XS: Packing(8, 128),
        GGUFType.MXFP4: Packing(4, 0, mode="mxfp4"),
    }
)
"""What is not here is stored as floats and stays as it is."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Some rows in MLX's form: codes [rows, columns * bits / 32], and for each set scales and biases, float32
    [rows, columns / 32]. With mxfp4 scales are uint8 and there are no biases."""

    codes: NDArray[np.uint32]
    sets: tuple[tuple[Float32s, Float32s] | tuple[Bytes], ...]

    @property
    def arrays(self) -> list[NDArray[Any]]:
        return [self.codes, *(array for own in self.sets for array in own)]

    def part(self, start: int, stop: int) -> Groups:
        """Some rows, as views."""
        sets = tuple(
            (own[0][start:stop], own[1][start:stop]) if len(own) == 2 else (own[0][start:stop],) for own in self.sets
        )
        return Groups(self.codes[start:stop], sets)


def device_bytes(weight: Weight) -> int:
    """What a tensor takes on the device."""
    packing = PACKINGS.get(weight.type)
    return weight.data.nbytes if packing is None else int(prod(weight.shape) // GROUP * _group_bytes(packing))


def growth() -> dict[str, float]:
    """How many times as many bytes as in the file, for the types that take more."""
    sizes = {type: (_group_bytes(packing) / GROUP, BLOCKS[type]) for type, packing in PACKINGS.items()}
    ratios = {type.name: size * block.n_weights / block.n_bytes for type, (size, block) in sizes.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > 1}


def fill(weight: Weight, groups: Groups) -> None:
    """Write a quantised matrix, or all matrices of a stack, in MLX's form: into arrays of the host's memory."""
    rows = weight.data.reshape(prod(weight.shape[:-1]), -1)
    step = max(1, PIECE_WEIGHTS // weight.shape[-1])
    scratch = Scratch()
    for start in range(0, len(rows), step):
        _fill_rows(weight.type, rows[start : start + step], groups.part(start, start + step), scratch)


def pieces(weight: Weight) -> Iterator[tuple[int, int, Groups]]:
    """The same, some rows [start, stop) at a time, in arrays of their own."""
    rows = weight.data.reshape(prod(weight.shape[:-1]), -1)
    step = max(1, COPIED_WEIGHTS // weight.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        groups = _room(PACKINGS[weight.type], len(part), weight.shape[-1])
        fill(replace(weight, shape=(len(part), weight.shape[-1]), data=part.reshape(-1)), groups)
        yield start, start + len(part), groups


def _room(packing: Packing, n_rows: int, n_columns: int) -> Groups:
    n_groups = n_columns // GROUP
    codes = np.empty((n_rows, n_groups * packing.bits), np.uint32)
    if packing.mode == "mxfp4":
        return Groups(codes, ((np.empty((n_rows, n_groups), np.uint8),),))
    scales = np.empty((packing.sets, 2, n_rows, n_groups), np.float32)
    return Groups(codes, tuple((own[0], own[1]) for own in scales))


def _fill_rows(type: GGUFType, rows: Bytes, groups: Groups, scratch: Scratch) -> None:
    repack = REPACK.get(type)
    with np.errstate(invalid="ignore", over="ignore"):  # hostile units may be infinite or NaN
        if repack is not None:
            blocks = rows.reshape(-1, BLOCKS[type].n_bytes)
            sets = tuple((own[0].reshape(-1), own[1].reshape(-1)) for own in groups.sets if len(own) == 2)
            repack(blocks, groups.codes.reshape(-1).view(np.uint8), sets, scratch)
            return
        found = _groups(type, rows)
    for array, values in zip(groups.arrays, found.arrays, strict=True):
        array[...] = values


def _group_bytes(packing: Packing) -> int:
    return packing.bits * GROUP // 8 + (1 if packing.mode == "mxfp4" else packing.sets * 8)


def _groups(type: GGUFType, rows: Bytes) -> Groups:
    packing, n_rows = PACKINGS[type], len(rows)
    blocks = rows.reshape(-1, BLOCKS[type].n_bytes)
    if packing.mode == "mxfp4":
        nibbles = np.stack([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
        return Groups(_packed(nibbles, packing.bits, n_rows), ((blocks[:, 0].reshape(n_rows, -1),),))
    codes = UNPACK[type](blocks)
    values = codes.values.view(np.uint8) + np.uint8(packing.offset)  # modulo 256, as the bits of int8 are
    scales, biases = _affine(codes, np.float32(packing.offset))
    by_set = (_by_set(each, n_rows, packing.sets) for each in (scales, biases))
    return Groups(_packed(values, packing.bits, n_rows), tuple(zip(*by_set, strict=True)))


def _affine(codes: Codes, offset: np.float32) -> tuple[Float32s, Float32s]:
    """Scale and bias of each group, [blocks, groups]: every product is exact."""
    n_groups = codes.values.shape[1]
    scales = (
        np.repeat(codes.d[:, None], n_groups, 1) if codes.scales is None else codes.d[:, None] * _float(codes.scales)
    )
    if codes.minima is None or codes.dmin is None:
        return scales, -offset * scales
    return scales, -(codes.dmin[:, None] * _float(codes.minima))


def _float(integers: NDArray[np.int32]) -> Float32s:
    return integers.astype(np.float32)


def _by_set(values: Float32s, n_rows: int, sets: int) -> Float32s:
    """[blocks, groups of a block] -> [sets, rows, columns / 32]: with two sets neighbours go to one each."""
    return np.ascontiguousarray(np.moveaxis(values.reshape(n_rows, -1, sets), 2, 0))


def _packed(codes: NDArray[np.uint8], bits: int, n_rows: int) -> NDArray[np.uint32]:
    """Codes in any shape of whole rows -> [rows, columns * bits / 32]: a little-endian stream of bits."""
    stream: NDArray[Any] = np.ascontiguousarray(codes).reshape(-1)  # of 8, 16, 32 and 64 bits in turn
    if bits < 8:
        for n_codes, dtype in ((1, "<u2"), (2, "<u4"), (4, "<u8")):  # two neighbours of so many codes become one
            pairs = stream.view(dtype)
            low = pairs & pairs.dtype.type((1 << 8 * n_codes) - 1)
            stream = low | pairs >> 8 * n_codes << bits * n_codes
        stream = np.ascontiguousarray(stream.view(np.uint8).reshape(-1, 8)[:, :bits])  # eight codes: `bits` bytes
    return stream.reshape(n_rows, -1).view("<u4")
