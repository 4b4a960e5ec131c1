"""Blocks to float32 by torch operations, on any device: the bits of ggml's reference, and of the numpy backend.

Layouts: `block_*` in ggml-common.h; values: `dequantize_row_*` in ggml-quants.c. As in `prima_numpy/unpack.py` every
type fits the form of `Codes`: where ggml has d * (0.5 + s) / 4, it is d / 8 times the odd number 2 s + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from prima_core.model.codebooks import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, MXFP4, Grid, sign_bytes
from prima_core.model.quant import GGUFType
from prima_torch.planes import Planes, part

Fields = Mapping[str, torch.Tensor]  # uint8 [blocks, bytes of the field]


@dataclass(frozen=True, slots=True)
class Codes:
    """Unpacked blocks: weight = d * scale * code - dmin * minimum, where scale and minimum are per group of a block."""

    values: torch.Tensor  # int8 [blocks, groups, group size]
    d: torch.Tensor  # f32 [blocks]
    scales: torch.Tensor | None = None  # integers [blocks, groups]; None: all 1
    minima: torch.Tensor | None = None  # integers [blocks, groups]; None: all 1 where there is dmin
    dmin: torch.Tensor | None = None  # f32 [blocks]; None: nothing is taken off


class Unpacker:
    """Dequantises what lies on `device`, where its tables are."""

    def __init__(self, device: torch.device) -> None:
        self._tables = _Tables(device)

    def rows(self, planes: Planes, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as f32 [stop - start, columns]. F32 is a view."""
        return self._values(part(planes, start, stop))

    def picked(self, planes: Planes, rows: torch.Tensor) -> torch.Tensor:
        """Some rows, i64 [n], as f32 [n, columns]; only these are read."""
        fields = {name: field[rows] for name, field in planes.fields.items()}
        return self._values(Planes(planes.type, len(rows), planes.columns, fields))

    def _values(self, planes: Planes) -> torch.Tensor:
        if planes.type in FLOATS:
            return as_floats(planes).to(torch.float32)
        blocks = {name: field.flatten(0, 1) for name, field in planes.fields.items()}
        return _multiplied(_UNPACK[planes.type](blocks, self._tables)).reshape(planes.rows, planes.columns)


def as_floats(planes: Planes) -> torch.Tensor:
    """A matrix of one of FLOATS as what it is [rows, columns], a view."""
    return planes.fields["w"].view(FLOATS[planes.type]).view(planes.rows, planes.columns)


class _Tables:
    """What codes stand for, made when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._grids: dict[Grid, torch.Tensor] = {}
        self._levels: dict[tuple[int, ...], torch.Tensor] = {}
        self.signs = torch.tensor(sign_bytes(), dtype=torch.uint8, device=device)

    def entries(self, grid: Grid, index: torch.Tensor) -> torch.Tensor:
        """int8 [*index.shape, width]"""
        if grid not in self._grids:
            levels = torch.tensor(grid.values(), dtype=torch.int8, device=self._device)
            self._grids[grid] = levels.reshape(-1, grid.width)
        return self._grids[grid][index.long()]

    def looked_up(self, levels: tuple[int, ...], packed: torch.Tensor) -> torch.Tensor:
        """Nibbles [..., k bytes] -> int8 [..., 2, k]"""
        if levels not in self._levels:
            self._levels[levels] = torch.tensor(levels, dtype=torch.int8, device=self._device)
        return self._levels[levels][_nibbles(packed).long()]

    def even_signs(self, index: torch.Tensor) -> torch.Tensor:
        """Sign bytes, of the shape of `index`."""
        return self.signs[index.long()]

    def four_signs(self, packed: torch.Tensor) -> torch.Tensor:
        """Four sign bytes from the lower 28 bits of each: [..., k] -> [..., k, 4]"""
        return self.even_signs(_runs(packed, range(0, 28, 7), 127))


def _multiplied(codes: Codes) -> torch.Tensor:
    """[blocks, weights per block], multiplied in the order of ggml's reference."""
    step = codes.d[:, None] if codes.scales is None else codes.d[:, None] * codes.scales.to(torch.float32)
    values = step[:, :, None] * codes.values.to(torch.float32)
    if codes.dmin is not None:
        low = codes.dmin[:, None]
        values -= (low if codes.minima is None else low * codes.minima.to(torch.float32))[:, :, None]
    return values.flatten(1)


# ---------------------------------------------------------------- blocks of 32: one group


def _q4_0(f: Fields, tables: _Tables) -> Codes:
    return Codes(_signed(_nibbles(f["qs"]), 8).reshape(-1, 1, 32), _half(f["d"]))


def _q4_1(f: Fields, tables: _Tables) -> Codes:
    return Codes(_nibbles(f["qs"]).reshape(-1, 1, 32), _half(f["d"]), dmin=-_half(f["m"]))


def _q5_0(f: Fields, tables: _Tables) -> Codes:
    return Codes(_signed(_five_bits(f), 16), _half(f["d"]))


def _q5_1(f: Fields, tables: _Tables) -> Codes:
    return Codes(_five_bits(f), _half(f["d"]), dmin=-_half(f["m"]))


def _q8_0(f: Fields, tables: _Tables) -> Codes:
    return Codes(f["qs"].view(torch.int8)[:, None], _half(f["d"]))


def _iq4_nl(f: Fields, tables: _Tables) -> Codes:
    return Codes(tables.looked_up(IQ4_NL, f["qs"]).reshape(-1, 1, 32), _half(f["d"]))


def _mxfp4(f: Fields, tables: _Tables) -> Codes:
    exponent = f["e"][:, 0].to(torch.int32)  # e8m0 of twice the unit; the lowest two units are subnormal
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return Codes(tables.looked_up(MXFP4, f["qs"]).reshape(-1, 1, 32), bits.to(torch.int32).view(torch.float32))


def _five_bits(f: Fields) -> torch.Tensor:
    return (_nibbles(f["qs"]).flatten(1) | _bits(f["qh"]).flatten(1) << 4).reshape(-1, 1, 32)


# ---------------------------------------------------------------- K types: 256 in groups of 16 or 32


def _q2_k(f: Fields, tables: _Tables) -> Codes:
    values = _fields(f["qs"].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    return Codes(values, _half(f["d"]), f["scales"] & 15, f["scales"] >> 4, _half(f["dmin"]))


def _q3_k(f: Fields, tables: _Tables) -> Codes:
    low = _fields(f["qs"].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    high = _fields(f["hmask"], range(8), 1).reshape(-1, 16, 16)
    low_scales = _nibbles(f["scales"][:, :8]).reshape(-1, 16)
    high_scales = _fields(f["scales"][:, 8:], range(0, 8, 2), 3).reshape(-1, 16)
    return Codes(_signed(low | high << 2, 4), _half(f["d"]), _signed(low_scales | high_scales << 4, 32))


def _q4_k(f: Fields, tables: _Tables) -> Codes:
    nibbles = _nibbles(f["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return Codes(nibbles, _half(f["d"]), *_packed_scales(f["scales"]), _half(f["dmin"]))


def _q5_k(f: Fields, tables: _Tables) -> Codes:
    nibbles = _nibbles(f["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    values = nibbles | _fields(f["qh"], range(8), 1) << 4
    return Codes(values, _half(f["d"]), *_packed_scales(f["scales"]), _half(f["dmin"]))


def _q6_k(f: Fields, tables: _Tables) -> Codes:
    nibbles = _nibbles(f["ql"].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    pairs = _fields(f["qh"].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    return Codes(_signed(nibbles | pairs << 4, 32), _half(f["d"]), f["scales"].view(torch.int8))


def _packed_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.hstack([first & 63, third & 15 | first >> 2 & 48])
    return scales, torch.hstack([second & 63, third >> 4 | second >> 2 & 48])


# ---------------------------------------------------------------- IQ types: 256, codes from tables


def _iq4_xs(f: Fields, tables: _Tables) -> Codes:
    high = _fields(_words16(f["scales_h"]), range(0, 16, 2), 3).reshape(-1, 8)
    values = tables.looked_up(IQ4_NL, f["qs"].reshape(-1, 8, 16)).reshape(-1, 8, 32)
    return Codes(values, _half(f["d"]), (_nibble_pairs(f["scales_l"]) | high << 4) - 32)


def _iq2_xxs(f: Fields, tables: _Tables) -> Codes:
    groups = f["qs"].reshape(-1, 8, 8)  # four indices, then 4 * 7 bits of signs and 4 of scale
    packed = _words32(groups[:, :, 4:])[:, :, 0]
    values = _negated(tables.entries(IQ2_XXS, groups[:, :, :4]), tables.four_signs(packed))
    return Codes(values.reshape(-1, 8, 32), _half(f["d"], 1 / 8), _odd(packed >> 28 & 15))


def _iq2_xs(f: Fields, tables: _Tables) -> Codes:
    packed = _words16(f["qs"])  # 9 bits of index, 7 of signs
    values = _negated(tables.entries(IQ2_XS, packed & 511), tables.even_signs(packed >> 9))
    return Codes(values.reshape(-1, 16, 16), _half(f["d"], 1 / 8), _odd(_nibble_pairs(f["scales"])))


def _iq2_s(f: Fields, tables: _Tables) -> Codes:
    high = _runs(f["qh"], range(0, 8, 2), 3).reshape(-1, 32)
    index, signs = f["qs"][:, :32] | high.to(torch.int32) << 8, f["qs"][:, 32:]
    values = _negated(tables.entries(IQ2_S, index), signs)
    return Codes(values.reshape(-1, 16, 16), _half(f["d"], 1 / 8), _odd(_nibble_pairs(f["scales"])))


def _iq3_xxs(f: Fields, tables: _Tables) -> Codes:
    packed = _words32(f["qs"][:, 64:])
    values = _negated(tables.entries(IQ3_XXS, f["qs"][:, :64]), tables.four_signs(packed))
    return Codes(values.reshape(-1, 8, 32), _half(f["d"], 1 / 4), _odd(packed >> 28 & 15))


def _iq3_s(f: Fields, tables: _Tables) -> Codes:
    index = f["qs"] | _bits(f["qh"]).flatten(1).to(torch.int32) << 8
    values = _negated(tables.entries(IQ3_S, index), f["signs"])
    return Codes(values.reshape(-1, 8, 32), _half(f["d"]), _odd(_nibble_pairs(f["scales"])))


def _iq1_s(f: Fields, tables: _Tables) -> Codes:
    packed = _words16(f["qh"])  # 4 * 3 bits of index, 3 of scale, the sign of the offset
    index = f["qs"] | _runs(packed, range(0, 12, 3), 7).reshape(-1, 32) << 8
    values = tables.entries(IQ1, index).reshape(-1, 8, 32) + _offset(packed >> 15)[:, :, None]
    return Codes(values, _half(f["d"], 1 / 8), _odd(packed >> 12 & 7))


def _iq1_m(f: Fields, tables: _Tables) -> Codes:
    high = _nibble_pairs(f["qh"])  # 3 bits of index, the sign of the offset
    index = f["qs"] | (high & 7).to(torch.int32) << 8
    values = tables.entries(IQ1, index) + _offset(high >> 3)[:, :, None]
    packed = _words16(f["scales"])  # 4 * 3 bits of scales, a nibble of d
    d = packed[:, :1] >> 12 | packed[:, 1:2] >> 12 << 4 | packed[:, 2:3] >> 12 << 8 | packed[:, 3:] >> 12 << 12
    scales = _odd(_runs(packed, range(0, 12, 3), 7).reshape(-1, 16))
    return Codes(values.reshape(-1, 16, 16), _half(d.to(torch.int16).view(torch.uint8), 1 / 8), scales)


def _negated(values: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """`values`, minus where a bit of `signs` is set: as many bits as values, lowest first."""
    return torch.where(_bits(signs).reshape(values.shape).bool(), -values, values)


def _odd(scales: torch.Tensor) -> torch.Tensor:
    return 2 * scales + 1


def _offset(is_minus: torch.Tensor) -> torch.Tensor:
    """The eighth that IQ1 adds to its grid, in eighths: int8."""
    return 1 - 2 * is_minus.to(torch.int8)


# ---------------------------------------------------------------- bits


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., k] -> [..., 2, k]: all low nibbles, then all high ones."""
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def _nibble_pairs(packed: torch.Tensor) -> torch.Tensor:
    """[blocks, k] -> [blocks, 2 k]: low and high nibble of each byte in turn."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _fields(packed: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """[..., k] -> [..., shifts, k]"""
    return torch.stack([packed >> shift & mask for shift in shifts], dim=-2)


def _runs(packed: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """[..., k] -> [..., k, shifts]"""
    return torch.stack([packed >> shift & mask for shift in shifts], dim=-1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[..., k] -> [..., k, 8], lowest first"""
    return _runs(packed, range(8), 1)


def _signed(codes: torch.Tensor, offset: int) -> torch.Tensor:
    """uint8 below 128 -> int8, less `offset`"""
    return codes.view(torch.int8) - offset


def _words16(packed: torch.Tensor) -> torch.Tensor:
    """[..., bytes] -> int32 [..., words]; torch does not shift unsigned words."""
    return packed.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF


def _words32(packed: torch.Tensor) -> torch.Tensor:
    """[..., bytes] -> int32 [..., words]; a shift fills up with the highest bit."""
    return packed.contiguous().view(torch.int32)


def _half(two_bytes: torch.Tensor, unit: float = 1) -> torch.Tensor:
    """[blocks, 2] -> [blocks], times `unit`, a power of two."""
    return two_bytes.view(torch.float16)[:, 0].to(torch.float32) * unit


FLOATS: Mapping[GGUFType, torch.dtype] = MappingProxyType(
    {GGUFType.F32: torch.float32, GGUFType.F16: torch.float16, GGUFType.BF16: torch.bfloat16}
)
_UNPACK: Mapping[GGUFType, Callable[[Fields, _Tables], Codes]] = MappingProxyType(
    {
        GGUFType.Q4_0: _q4_0,
        GGUFType.Q4_1: _q4_1,
        GGUFType.Q5_0: _q5_0,
        GGUFType.Q5_1: _q5_1,
        GGUFType.Q8_0: _q8_0,
        GGUFType.Q2_K: _q2_k,
        GGUFType.Q3_K: _q3_k,
        GGUFType.Q4_K: _q4_k,
        GGUFType.Q5_K: _q5_k,
        GGUFType.Q6_K: _q6_k,
        GGUFType.IQ1_S: _iq1_s,
        GGUFType.IQ1_M: _iq1_m,
        GGUFType.IQ2_XXS: _iq2_xxs,
        GGUFType.IQ2_XS: _iq2_xs,
        GGUFType.IQ2_S: _iq2_s,
        GGUFType.IQ3_XXS: _iq3_xxs,
        GGUFType.IQ3_S: _iq3_s,
        GGUFType.IQ4_NL: _iq4_nl,
        GGUFType.IQ4_XS: _iq4_xs,
        GGUFType.MXFP4: _mxfp4,
    }
)
