"""What a model family is: the tensors of its layers, the keys of its files, and its block over the ops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.rope import Rope
from prima_core.arch.slots import Binder
from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model.facts import Scalar
from prima_core.model.header import TensorInfo, printable
from prima_core.model.names import OUTPUT, OUTPUT_NORM, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, TOKEN_EMBD, layer_tensor
from prima_core.model.quant import GGUFType, unsupported_type
from prima_core.model.rope import RopeKind
from prima_core.model.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]
"""Shapes in numpy order, by name without the `blk.N.` prefix."""

# A layer with its weights bound: writes the pass's K and V, gives the activation [n_tokens, d_model] after the layer.
Block = Callable[[A, Rope[A], K], A]


class Bind(Protocol):
    """Binds a layer's weights (by name without the `blk.N.` prefix) to ops. `Family.check` has seen the shapes.

    Vectors and matrices come from `binder`, always as many and in the same order.
    """

    def __call__(
        self, ops: Ops[A, W, K], binder: Binder[A, W], model: ModelSpec, layer: int, weights: Mapping[str, Weight]
    ) -> Block[A, K]: ...


def _none(model: ModelSpec) -> Shapes:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """Models that compute alike. `name` is the file's `general.architecture`.

    `shapes` are the tensors of every layer, `optional` those that a file may have too. `defaults` are the metadata keys
    (without the `{name}.` prefix) that the family reads beyond those of all, with what an absent one means; any other
    key that changes the mathematics is refused. `scaled_embedding`: rows are multiplied by the root of d_model.
    """

    name: str
    rope: RopeKind
    shapes: Callable[[ModelSpec], Shapes]
    block: Bind
    optional: Callable[[ModelSpec], Shapes] = _none
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    scaled_embedding: bool = False

    def check(self, model: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise ModelError, with the tensor as `field`, unless the file has the family's tensors and no others.

        An unknown tensor is refused, as llama.cpp does: it belongs to a variant that would be computed wrongly
        without it.
        """
        optional = dict(_optional(self, model))
        expected = dict(_required(self, model)) | optional
        for name, shape in expected.items():
            info = tensors.get(name)
            if info is not None:
                _check_tensor(info, shape)
            elif name not in optional:
                raise ModelError(
                    f"the tensor is missing; every {self.name} model has it", field=name, hint=_hint(tensors)
                )
        for name in tensors.keys() - expected.keys():
            raise ModelError(
                f"{self.name} models of {model.n_layers} layers have no such tensor",
                field=printable(name),
                hint="this is another kind of model than general.architecture says, or one with parts not supported",
            )


def _required(family: Family, model: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield TOKEN_EMBD, (model.vocab_size, model.d_model)
    yield OUTPUT_NORM, (model.d_model,)
    if not model.tied_output:
        yield OUTPUT, (model.vocab_size, model.d_model)
    yield from _of_layers(model, family.shapes(model))


def _optional(family: Family, model: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    factors = (model.rope.dim // 2,)
    if model.rope.original_context:
        yield from ((ROPE_LONG, factors), (ROPE_SHORT, factors))
    else:
        yield ROPE_FREQS, factors
    yield from _of_layers(model, family.optional(model))


def _of_layers(model: ModelSpec, shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(model.n_layers):
        for name, shape in shapes.items():
            yield layer_tensor(layer, name), shape


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.type is None:
        raise unsupported_type(info.name, info.type_name)
    if info.shape != shape:
        raise ModelError(f"has the shape {list(info.shape)}, but the metadata ask for {list(shape)}", field=info.name)
    if len(shape) == 1 and info.type is not GGUFType.F32:
        raise ModelError(f"is {info.type.name}; norms, biases and rope factors must be F32", field=info.name)


def _hint(tensors: Mapping[str, TensorInfo]) -> str:
    if any(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight", name) for name in tensors):
        return "the file has a tensor for each expert, as converters of 2023 wrote: download or convert the model again"
    return ""
