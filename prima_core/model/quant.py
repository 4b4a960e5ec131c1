"""GGUF tensor types: numbers, names, block sizes, and how many bytes a tensor takes. No compute.

Source: ggml's type table (`enum ggml_type`, block structs) as documented in the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from types import MappingProxyType

from prima_core.errors import ModelError
from prima_core.interfaces import KvType


class GGUFType(IntEnum):
    """The tensor types that prima reads, by their number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    MXFP4 = 39


@dataclass(frozen=True, slots=True)
class Block:
    """`n_weights` consecutive weights of a row are stored in `n_bytes`."""

    n_weights: int
    n_bytes: int


BLOCKS: Mapping[GGUFType, Block] = MappingProxyType(
    {
        GGUFType.F32: Block(1, 4),
        GGUFType.F16: Block(1, 2),
        GGUFType.Q4_0: Block(32, 18),
        GGUFType.Q4_1: Block(32, 20),
        GGUFType.Q5_0: Block(32, 22),
        GGUFType.Q5_1: Block(32, 24),
        GGUFType.Q8_0: Block(32, 34),
        GGUFType.Q2_K: Block(256, 84),
        GGUFType.Q3_K: Block(256, 110),
        GGUFType.Q4_K: Block(256, 144),
        GGUFType.Q5_K: Block(256, 176),
        GGUFType.Q6_K: Block(256, 210),
        GGUFType.IQ2_XXS: Block(256, 66),
        GGUFType.IQ2_XS: Block(256, 74),
        GGUFType.IQ3_XXS: Block(256, 98),
        GGUFType.IQ1_S: Block(256, 50),
        GGUFType.IQ4_NL: Block(32, 18),
        GGUFType.IQ3_S: Block(256, 110),
        GGUFType.IQ2_S: Block(256, 82),
        GGUFType.IQ4_XS: Block(256, 136),
        GGUFType.IQ1_M: Block(256, 56),
        GGUFType.BF16: Block(1, 2),
        GGUFType.MXFP4: Block(32, 17),
    }
)


# Every type that ggml has numbered, from 0 on, so that a refusal can name it. "-": a number that is not in use.
_GGML_TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 - - - MXFP4 NVFP4 Q1_0"
)


def known_type(number: int) -> GGUFType | None:
    """The type of that number, or None when prima does not read it."""
    try:
        return GGUFType(number)
    except ValueError:
        return None


def type_name(number: int) -> str:
    """ggml's name of a tensor type, for messages: `Q5_K`, or `number 77` for one that nobody knows."""
    names = _GGML_TYPES.split()
    return names[number] if number < len(names) and names[number] != "-" else f"number {number}"


def tensor_bytes(type: GGUFType, shape: Sequence[int], *, name: str = "") -> int:
    """Bytes that a tensor of this type and shape (numpy order) takes in a file.

    Raises ModelError, with `name` as the field, when a row is not a whole number of blocks.
    """
    block = BLOCKS[type]
    if shape[-1] % block.n_weights:
        raise ModelError(
            f"rows of {shape[-1]} weights are no multiple of {type.name}'s blocks of {block.n_weights}", field=name
        )
    return prod(shape) // block.n_weights * block.n_bytes


def kv_row_bytes(type: KvType, head_dim: int) -> int:
    """Bytes of one head's K, or V, at one position. Raises ModelError for heads that are no whole blocks."""
    block = BLOCKS[GGUFType[type.name]]
    if head_dim % block.n_weights:
        raise ModelError(
            f"heads of {head_dim} values are no multiple of the {block.n_weights} that {type} keeps together",
            field="attention.key_length",
            hint="keep K and V in f16 (--kv-type f16)",
        )
    return head_dim // block.n_weights * block.n_bytes


def unsupported_type(name: str, type_name: str) -> ModelError:
    """The error for a tensor whose type prima does not read."""
    return ModelError(
        f"tensor type {type_name} is not supported in this version",
        field=name,
        hint="prima reads F32, F16, BF16, Q4_0 to Q8_0, the K and IQ types and MXFP4: use such a file, "
        "for instance a Q4_K_M or Q8_0 one",
    )
