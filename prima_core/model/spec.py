"""What a model is: the numbers that every node must agree on, read once from the file's metadata and checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from prima_core.errors import ModelError
from prima_core.model.header import StringArray, TensorInfo, Value, printable
from prima_core.model.names import ROPE_FREQS, TOKEN_EMBD, Shapes, layer_shapes, layer_tensor, shared_shapes
from prima_core.model.quant import GGUFType, unsupported_type


class RopeKind(StrEnum):
    """Which dimensions rotate together: NORM pairs (2i, 2i+1), NEOX pairs (i, i + dim/2)."""

    NORM = "norm"
    NEOX = "neox"


ROPE_KINDS: Mapping[str, RopeKind] = MappingProxyType({"llama": RopeKind.NORM, "qwen2": RopeKind.NEOX})
"""The families that prima runs, by `general.architecture`."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` of head_dim. `linear_factor` divides positions (1: no scaling).

    llama3 scaling is carried by the tensor `rope_freqs.weight` [dim/2], which divides the frequencies.
    """

    kind: RopeKind
    dim: int
    theta: float
    linear_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts of a decoder-only transformer. Counts are in elements, not bytes."""

    arch: str
    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    tied_output: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Value], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
        """Read and check the numbers of a model of a supported family.

        Raises ModelError, with the key as `field`, for another family, a missing or senseless number, and for
        variants (mixture of experts, other rope scalings) that this version would compute wrongly.
        """
        arch = _arch(metadata)
        facts = _Facts(metadata, arch)
        facts.refuse_variants()
        d_model = facts.count("embedding_length", 1 << 20)
        n_heads = facts.count("attention.head_count", 1 << 16)
        n_kv_heads = facts.count("attention.head_count_kv", n_heads, default=n_heads)
        if n_heads % n_kv_heads:
            raise facts.error("attention.head_count_kv", f"{n_heads} heads cannot share {n_kv_heads}")
        head_dim = _head_dim(facts, d_model, n_heads)
        return cls(
            arch=arch,
            name=_name(metadata, arch),
            n_layers=facts.count("block_count", 1024),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=facts.count("feed_forward_length", 1 << 22),
            vocab_size=_vocab_size(facts, tensors),
            context_length=facts.count("context_length", 1 << 28),
            norm_eps=facts.number("attention.layer_norm_rms_epsilon", 0.0, 0.1),
            rope=_rope(facts, head_dim),
            tied_output="output.weight" not in tensors,
        )


def check_tensors(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ModelError, with the tensor as `field`, unless the file has the family's tensors and no others.

    An unknown tensor is refused, as llama.cpp does: it belongs to a variant that would be computed wrongly without it.
    """
    expected = dict(_expected(spec))
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is not None:
            _check_tensor(info, shape)
        elif name != ROPE_FREQS:
            raise ModelError(f"the tensor is missing; every {spec.arch} model has it", field=name)
    for name in tensors.keys() - expected.keys():
        raise ModelError(
            f"{spec.arch} models of {spec.n_layers} layers have no such tensor",
            field=printable(name),
            hint="this is another kind of model than general.architecture says, or one with parts not supported yet",
        )


def _expected(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from shared_shapes(spec).items()
    yield ROPE_FREQS, (spec.rope.dim // 2,)
    per_layer: Shapes = layer_shapes(spec)
    for layer in range(spec.n_layers):
        for name, shape in per_layer.items():
            yield layer_tensor(layer, name), shape


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.type is None:
        raise unsupported_type(info.name, info.type_name)
    if info.shape != shape:
        raise ModelError(f"has the shape {list(info.shape)}, but the metadata ask for {list(shape)}", field=info.name)
    if len(shape) == 1 and info.type is not GGUFType.F32:
        raise ModelError(f"is {info.type.name}; norms, biases and rope factors must be F32", field=info.name)


# ---------------------------------------------------------------- metadata


class _Facts:
    """Typed, bounded access to the keys `{arch}.*`."""

    def __init__(self, metadata: Mapping[str, Value], arch: str) -> None:
        self.metadata = metadata
        self.arch = arch

    def get(self, key: str) -> bool | int | float | str | None:
        value = self.metadata.get(f"{self.arch}.{key}")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise self.error(key, "is an array; values per layer are not supported")

    def error(self, key: str, message: str, hint: str = "") -> ModelError:
        return ModelError(message, field=f"{self.arch}.{key}", hint=hint)

    def count(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing in the metadata")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is {_show(value)}, not a whole number")
        if not 1 <= value <= most:
            raise self.error(key, f"is {value}; sane values are 1 to {most}")
        return value

    def number(self, key: str, above: float, most: float, default: float | None = None) -> float:
        """A finite float that is greater than `above` and at most `most`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing in the metadata")
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.error(key, f"is {_show(value)}, not a finite float")
        if not above < value <= most:
            raise self.error(key, f"is {value:g}; sane values are above {above:g} and at most {most:g}")
        return value

    def refuse_variants(self) -> None:
        """Models of the family's name whose mathematics this version lacks."""
        if self.get("expert_count") not in (None, 0):
            raise self.error("expert_count", "mixture-of-experts models are not supported yet", "use a dense model")
        scaling = self.get("rope.scaling.type")
        if scaling not in (None, "none", "linear"):
            raise self.error("rope.scaling.type", f"rope scaling {_show(scaling)} is not supported yet")
        if self.get("rope.scaling.attn_factor") not in (None, 1.0):
            raise self.error("rope.scaling.attn_factor", "scaled attention is not supported yet")


def _arch(metadata: Mapping[str, Value]) -> str:
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ModelError("is missing or no text", field="general.architecture")
    if arch not in ROPE_KINDS:
        raise ModelError(
            f"model family '{printable(arch)}' is not supported",
            field="general.architecture",
            hint=f"supported in this version: {', '.join(sorted(ROPE_KINDS))}",
        )
    return arch


def _name(metadata: Mapping[str, Value], arch: str) -> str:
    name = metadata.get("general.name")
    return printable(name.strip()) or arch if isinstance(name, str) else arch


def _head_dim(facts: _Facts, d_model: int, n_heads: int) -> int:
    if facts.get("attention.key_length") is None and d_model % n_heads:
        raise facts.error("attention.head_count", f"{n_heads} heads do not divide an embedding of {d_model}")
    head_dim = facts.count("attention.key_length", 1 << 12, default=d_model // n_heads)
    value_length = facts.count("attention.value_length", 1 << 12, default=head_dim)
    if value_length != head_dim:
        raise facts.error("attention.value_length", f"is {value_length}, but keys have {head_dim}: not supported")
    if head_dim % 2:
        raise facts.error(
            "attention.key_length", f"heads of {head_dim} cannot rotate in pairs: the number must be even"
        )
    return head_dim


def _rope(facts: _Facts, head_dim: int) -> RopeSpec:
    dim = facts.count("rope.dimension_count", 1 << 12, default=head_dim)
    if dim != head_dim:
        raise facts.error("rope.dimension_count", f"is {dim}, but heads have {head_dim}: not supported")
    theta = facts.number("rope.freq_base", 1.0, 1e12, default=10000.0)
    return RopeSpec(ROPE_KINDS[facts.arch], dim, theta, _linear_factor(facts))


def _linear_factor(facts: _Facts) -> float:
    """A factor without a type means linear, and `rope.scale_linear` is its old name: so llama.cpp reads them."""
    if facts.get("rope.scaling.type") == "none":
        return 1.0
    key = "rope.scaling.factor" if facts.get("rope.scaling.factor") is not None else "rope.scale_linear"
    return 1.0 if facts.get(key) == 0.0 else facts.number(key, 0.0, 1e6, default=1.0)


def _vocab_size(facts: _Facts, tensors: Mapping[str, TensorInfo]) -> int:
    """The embedding's rows where there are weights, else the tokenizer's tokens, else what the metadata say."""
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, StringArray) else 0
    if TOKEN_EMBD not in tensors:
        return n_tokens or facts.count("vocab_size", 1 << 24)
    n_rows = tensors[TOKEN_EMBD].shape[0]
    if n_tokens and n_tokens != n_rows:
        raise ModelError(f"has {n_rows} rows for a vocabulary of {n_tokens} tokens", field=TOKEN_EMBD)
    if n_rows > 1 << 24:
        raise ModelError(f"has {n_rows} rows; sane values are up to {1 << 24}", field=TOKEN_EMBD)
    return n_rows


def _show(value: object) -> str:
    return printable(repr(value))
